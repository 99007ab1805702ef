"""Critical paths of schedules: closed forms of even pipelines, walks of uneven ones, what stages hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from simtrain.planner.arrays.holding import GROUPS, moments
from simtrain.planner.arrays.paths import WIDTH, Part, Walk, find_paths, projected_micro_batches
from simtrain.step.schedules import in_flight, plan


def quantities(forward=0.0, backward=0.0, send=0.0, **others):
    row = np.zeros(WIDTH)
    row[[Part.FORWARD, Part.BACKWARD, Part.SEND_ACROSS]] = forward, backward, send
    for name, value in others.items():
        row[Part[name.upper()]] = value
    return row[None]


def step_s(schedule, stages, chunks, micro_batches, row):
    order = plan(schedule, stages, chunks, micro_batches)
    return float(Walk(order, (1,) * order.positions, 1, blocking=False).critical(row)[0][0])


@given(some.integers(2, 9), some.integers(1, 30), some.floats(1, 2), some.floats(1, 3), some.floats(0, 0.2))
@settings(max_examples=60, deadline=None)
def test_one_forward_one_backward_with_sends(stages, micro_batches, forward, backward, send):
    # every round of as many micro-batches as stages, a gradient must come back through all stages before the next can begin
    rounds, rest = divmod(micro_batches - 1, stages)
    sends = 2 * (stages - 1) * (1 + rounds) + 2 * max(rest - 1, 0)
    exact = (micro_batches + stages - 1) * (forward + backward) + sends * send
    assert step_s("1f1b", stages, 1, micro_batches, quantities(forward, backward, send)) == pytest.approx(exact)


@given(some.integers(2, 6), some.integers(2, 4), some.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_interleaving_divides_the_bubble(stages, chunks, rounds):
    """Narayanan et al. 2021: `(p - 1) (f + b) / v` of bubble."""
    whole = stages * rounds * chunks * 3.0 + (stages - 1) * 3.0
    assert step_s("interleaved", stages, chunks, stages * rounds, quantities(1.0, 2.0)) == pytest.approx(whole)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb-h1", 1)])
def test_few_paths_say_as_much_as_walking(schedule, chunks):
    order = plan(schedule, 6, chunks, 18)
    graph = Walk(order, (2,) * order.positions, 1, blocking=False)
    random = np.random.default_rng(1)
    rows = random.uniform(0.5, 1.5, (200, WIDTH))
    rows[:, [Part.SEND_INSIDE, Part.SEND_ACROSS]] *= 0.1
    paths = find_paths(graph, rows)
    walked, _ = graph.critical(rows)
    known = (rows @ paths.T).max(axis=1)
    assert np.all(known <= walked * (1 + 1e-12)), "a path is never longer than the longest"
    assert np.all(known >= walked * 0.98)
    assert len(paths) <= 24


def test_longer_steps_are_projected_from_shorter_ones():
    row = quantities(1.0, 2.2, 0.1, forward_behind=0.7, backward_behind=1.1)
    for stages, micro_batches in ((4, 50), (6, 61)):
        short, longer = projected_micro_batches(stages, micro_batches)
        few, more = (step_s("1f1b", stages, 1, n, row) for n in (short, longer))
        projected = few + (more - few) * (micro_batches - short) / (longer - short)
        assert projected == pytest.approx(step_s("1f1b", stages, 1, micro_batches, row), rel=1e-3)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 3)])
def test_what_stages_hold_is_what_is_in_flight(schedule, chunks):
    order = plan(schedule, 4, chunks, 12)
    most = in_flight(order).forward
    for stage in range(4):
        rows = moments(order, stage, (1,) * order.positions)
        backward = rows[:, 2 * GROUPS :].reshape(len(rows), GROUPS, 3)[:, :, 1:].sum(axis=(1, 2)) > 0
        assert rows[backward, :GROUPS].sum(axis=1).max() == most[stage]
