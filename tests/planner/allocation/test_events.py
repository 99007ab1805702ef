"""Pipelines by event against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from simtrain.planner.allocation.events import Pipelines, finish_s


def even(stages: int, forward: float, backward: float, send: float) -> Pipelines:
    shape = (1, stages)
    return Pipelines(np.full(shape, forward), np.full(shape, backward), np.full((1, stages - 1), send), np.zeros(1))


@settings(deadline=None)
@given(some.integers(1, 6), some.integers(1, 20), some.floats(0.1, 3), some.floats(0.1, 3))
def test_without_transfers_it_is_the_textbook_pipeline(stages, micro_batches, forward, backward):
    lines = even(stages, forward, backward, 0.0)
    for transfers in ("rendezvous", "sender", "asynchronous"):
        expected = (micro_batches + stages - 1) * (forward + backward)
        assert finish_s(lines, micro_batches, transfers)[0] == pytest.approx(expected)


@pytest.mark.parametrize(("stages", "transfers_per_micro_batch"), [(2, 2), (3, 4), (5, 4)])
def test_blocking_transfers_cost_both_ends_of_every_stage(stages, transfers_per_micro_batch):
    send = 0.01
    times = [finish_s(even(stages, 1.0, 2.0, send), m, "rendezvous")[0] for m in (100, 200)]
    assert (times[1] - times[0]) / 100 == pytest.approx(3.0 + transfers_per_micro_batch * send)


@settings(deadline=None)
@given(some.integers(2, 5), some.integers(1, 12), some.floats(0, 0.5), some.integers(0, 2**32 - 1))
def test_waiting_more_is_never_faster(stages, micro_batches, send, seed):
    random = np.random.default_rng(seed)
    lines = Pipelines(random.uniform(0.2, 2, (1, stages)), random.uniform(0.2, 2, (1, stages)), np.full((1, stages - 1), send), np.zeros(1))
    free, sender, both = (finish_s(lines, micro_batches, t)[0] for t in ("asynchronous", "sender", "rendezvous"))
    assert free <= sender + 1e-12
    assert free <= both + 1e-12
    busiest = (lines.forward_s + lines.backward_s).max() * micro_batches
    assert free >= busiest - 1e-9


def test_asynchronous_order_is_one_forward_one_backward():
    # F0 F1 | the second stage begins after one forward and one transfer
    lines = even(2, 1.0, 2.0, 0.5)
    assert finish_s(lines, 1, "asynchronous")[0] == pytest.approx(1 + 0.5 + 3 + 0.5 + 2)
