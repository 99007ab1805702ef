"""Bubbles and activations in flight against the formulas of the papers: even stages, free transfers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simtrain.step.schedules import Action, SchedulePlan, in_flight, makespan, period, plan, timeline
from simtrain.step.schedules.interleaved import warm_up_chunks


def busy(laid_out: SchedulePlan, forward: float, first: float, second: float) -> float:
    """Work of the rank that has most of it."""
    durations = np.array([forward, first + second, first, second])[laid_out.action]
    return float(np.bincount(laid_out.rank, durations).max())


def bubble(name: str, p: int, v: int, m: int, forward: float, first: float, second: float) -> float:
    laid_out = plan(name, p, v, m)
    return makespan(laid_out, forward, first, second) - busy(laid_out, forward, first, second)


durations = st.floats(0.1, 10)
stages = st.integers(1, 9)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["gpipe", "1f1b"]), stages, st.integers(1, 20), durations, durations, durations)
def test_gpipe_and_1f1b(name, p, m, forward, first, second):
    laid_out = plan(name, p, 1, m)
    total = makespan(laid_out, forward, first, second)
    share = 1 - busy(laid_out, forward, first, second) / total
    assert share == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["interleaved", "breadth-first"]), stages, st.integers(1, 4), st.integers(1, 4), durations, durations, durations)
def test_chunks_divide_the_bubble(name, p, v, groups, forward, first, second):
    """Narayanan et al. 2021, section 2.2.2, and Lamy-Poirier 2023: (p - 1) / v passes of a stage."""
    got = bubble(name, p, v, groups * p, forward / v, first / v, second / v)
    assert got == pytest.approx((p - 1) * (forward + first + second) / v, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 7), durations, durations)
def test_breadth_first_needs_no_multiple_of_the_stages(p, v, more, forward, back):
    assert bubble("breadth-first", p, v, p + more, forward, back, 0.0) == pytest.approx((p - 1) * (forward + back), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(stages, st.integers(0, 12), durations, durations, durations)
def test_zero_bubble_h1(p, more, forward, first, second):
    """Qi et al. 2023, table 2; a weight gradient longer than the other parts fills no more of the bubble than they leave."""
    got = bubble("zb-h1", p, 1, 2 * p + more, forward, first, second)
    assert got == pytest.approx((p - 1) * (forward + first - min(forward, first, second)), abs=1e-9)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 16), (8, 24)])
def test_zero_bubble_h1_has_a_third_of_the_bubble(p, m):
    assert bubble("zb-h1", p, 1, m, 1, 1, 1) == pytest.approx(bubble("1f1b", p, 1, m, 1, 1, 1) / 3)


@pytest.mark.parametrize("p", [1, 2, 3, 5, 8])
def test_zero_bubble_h2_leaves_no_rank_idle_between_its_first_and_last_instruction(p):
    m = 2 * p + 3
    laid_out = plan("zb-h2", p, 1, m)
    run = timeline(laid_out, 1, 1, 1)
    for rank in range(p):
        mine = laid_out.of_rank(rank)
        assert run.end_s[mine].max() - run.start_s[mine].min() == 3 * m
    assert period(laid_out, 1, 1, 1) == 3 * m
    assert makespan(laid_out, 1, 1, 1) == 3 * m + p - 1  # a rank is a forward pass later than the one before


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 7), st.integers(0, 8), st.floats(0.5, 2), st.floats(0.5, 2), st.floats(0, 2))
def test_zero_bubble_h2_with_uneven_parts(p, more, forward, first, second):
    """Qi et al. 2023, table 2, from step to step, where it is not negative and the first gradient does not come later still."""
    laid_out = plan("zb-h2", p, 1, 3 * p + more)
    got = period(laid_out, forward, first, second) - busy(laid_out, forward, first, second)
    assert got == pytest.approx((p - 1) * max(forward + first - 2 * second, first - forward, 0), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(0, 6), durations, st.floats(0, 1))
def test_dualpipe(half_p, more, forward, part):
    """(p / 2 - 1)(F&B + B - 3 W): exact where an input gradient costs a forward pass and a weight gradient no more."""
    p, second = 2 * half_p, part * forward
    full = forward + second
    got = bubble("dualpipe", p, 2, 2 * p + 2 * more, forward, forward, second)
    assert got == pytest.approx((half_p - 1) * ((forward + full) + full - 3 * second), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(stages, st.integers(1, 24))
def test_in_flight_one_chunk(p, m):
    rank = np.arange(p)
    assert in_flight(plan("gpipe", p, 1, m)).forward.tolist() == [m] * p
    assert in_flight(plan("1f1b", p, 1, m)).forward.tolist() == np.minimum(m, p - rank).tolist()
    h1, h2 = in_flight(plan("zb-h1", p, 1, m)), in_flight(plan("zb-h2", p, 1, m))
    assert h1.forward.tolist() == np.minimum(m, p - rank).tolist()
    assert h1.total.tolist() == [min(m, p)] * p
    assert h2.forward.tolist() == np.minimum(m, 2 * (p - rank) - 1).tolist()
    assert h2.total.tolist() == [min(m, 2 * p - 1)] * p


@settings(deadline=None, max_examples=30)
@given(stages, st.integers(2, 4), st.integers(1, 4))
def test_in_flight_of_chunks(p, v, groups):
    """Megatron-LM's warm-up and one more."""
    m = groups * p
    warm_up = np.array([warm_up_chunks(rank, p, v) for rank in range(p)])
    assert warm_up.tolist() == [2 * (p - rank - 1) + (v - 1) * p for rank in range(p)]
    assert in_flight(plan("interleaved", p, v, m)).forward.tolist() == np.minimum(m * v, warm_up + 1).tolist()
    assert in_flight(plan("breadth-first", p, v, m)).forward.tolist() == [m * v] * p


@pytest.mark.parametrize("p", [2, 4, 6, 8, 16])
def test_in_flight_dualpipe(p):
    """One more than there are stages, and every position held twice."""
    laid_out = plan("dualpipe", p, 2, 3 * p)
    assert in_flight(laid_out).total.tolist() == [p + 1] * p
    assert laid_out.positions == p
    assert laid_out.holders == tuple(
        (position, p - 1 - position) if position < p / 2 else (p - 1 - position, position) for position in range(p)
    )


def test_in_flight_by_chunk_at_the_peak():
    """Four stages of two chunks: rank 0 warms up with two groups of four and two more of the third."""
    flight = in_flight(plan("interleaved", 4, 2, 8))
    assert flight.forward_at_peak[0].tolist() == [7, 4]
    assert flight.kept_at_peak.sum() == 0


def test_unequal_stages_are_bound_by_the_slowest():
    forward = np.array([1.0, 3.0, 1.0, 1.0])
    m = 50
    total = makespan(plan("1f1b", 4, 1, m), forward, forward, forward)
    assert total == pytest.approx(m * 9.0 + 3.0)  # it waits for one forward pass before it, and one backward pass follows it


def test_transfers_delay_the_first_micro_batch_once_per_hop():
    assert makespan(plan("1f1b", 4, 1, 1), 1, 1, 1, transfer_s=0.5) == 4 * 3 + 6 * 0.5
    assert makespan(plan("interleaved", 1, 3, 2), 1, 1, 1, transfer_s=0.5) == 18  # one rank hands nothing over


def test_actions_of_every_schedule_sum_to_the_same_work():
    for name, v in (("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-h2", 1), ("interleaved", 3), ("breadth-first", 3), ("dualpipe", 2)):
        laid_out = plan(name, 4, v, 8)
        count = np.bincount(laid_out.action, minlength=4)
        each = 8 * laid_out.positions
        assert count[Action.FORWARD] == each
        assert count[Action.BACKWARD] + count[Action.INPUT_GRADIENT] == each
        assert count[Action.INPUT_GRADIENT] == count[Action.WEIGHT_GRADIENT]
