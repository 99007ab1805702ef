"""Steady states that steps repeated do not show: steps that take turns, lanes that nobody couples, lanes that hardly differ."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.program import Program, Stream, TermKind
from simtrain.core.runtimes import RUNTIMES
from simtrain.step.eigenmode import eigenmode
from simtrain.step.longest_path import Recursion, steady_state
from simtrain.step.lower import lower
from simtrain.step.setting import resolve

Edge = tuple[int, int, float]


def program(durations_s: list[float], waits: list[Edge], carries: list[Edge], kind: TermKind = TermKind.FORWARD) -> Program:
    """Terms that take as long as said; an edge is who is waited for, who waits, and how much longer."""
    count = len(durations_s)
    waits = sorted(waits, key=lambda edge: edge[1])
    nothing = np.zeros(count)
    zeros, none = np.zeros(count, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return Program(
        rank_classes=(),
        streams=(Stream((), "compute"),),
        resources=(),
        labels=("",),
        kind=np.full(count, int(kind)),
        stream=zeros,
        label=zeros,
        micro_batch=zeros,
        recompute_s=nothing,
        wire_s=nothing,
        memory_s=nothing,
        traffic_bytes=nothing,
        latency_s=np.array(durations_s),
        demand_pointer=np.zeros(count + 1, dtype=np.int64),
        demand_resource=none,
        demand_amount=np.zeros(0),
        predecessor_pointer=np.searchsorted([b for _, b, _ in waits], np.arange(count + 1)),
        predecessor=np.array([a for a, _, _ in waits], dtype=np.int64),
        predecessor_lag_s=np.array([lag for _, _, lag in waits]),
        carry_source=np.array([a for a, _, _ in carries], dtype=np.int64),
        carry_target=np.array([b for _, b, _ in carries], dtype=np.int64),
        carry_lag_s=np.array([lag for _, _, lag in carries]),
    )


def walked(made: Program, steps: int) -> np.ndarray:
    """Ends of the terms in each of some steps, from the first on."""
    recursion, ends = Recursion(made), []
    for _ in range(steps):
        ends.append(recursion.step(made.durations_s(), ends[-1] if ends else None)[1])
    return np.array(ends)


def test_steps_that_take_turns_take_their_mean():
    """Two lanes wait for each other over the step boundary alone: steps last 3 s and 5 s in turn, after which all is 8 s later."""
    turns = program([3.0, 5.0], [], [(0, 1, 0.0), (1, 0, 0.0), (0, 0, -2.0), (1, 1, -4.0)])
    ends = walked(turns, 40)
    assert not np.allclose(np.diff(ends, axis=0), 4.0)
    np.testing.assert_allclose(ends[20] - ends[18], 8.0)
    steady = steady_state(turns, turns.durations_s())
    assert steady.period_s == pytest.approx(4.0)
    after = Recursion(turns).step(turns.durations_s(), steady.end_s + 100)
    np.testing.assert_allclose(after[1] - 100 - steady.end_s, 4.0)
    np.testing.assert_allclose(after[0] - 100 - steady.start_s, 4.0)


def test_of_lanes_that_nobody_couples_the_slowest_sets_the_pace():
    apart = program([1.0, 1.0, 2.5], [(0, 1, 0.5)], [(1, 0, 0.0), (2, 2, 0.0)])
    growth, _ = eigenmode(apart, apart.durations_s(), walked(apart, 1)[0])
    np.testing.assert_allclose(growth, [2.5, 2.5, 2.5])
    slower = program([1.0, 1.0, 4.0], [(0, 1, 0.5)], [(1, 0, 0.0), (2, 2, 0.0)])
    growth, _ = eigenmode(slower, slower.durations_s(), walked(slower, 1)[0])
    np.testing.assert_allclose(growth, [2.5, 2.5, 4.0])
    steady = steady_state(slower, slower.durations_s())
    assert steady.period_s == pytest.approx(4.0)
    assert steady.end_s[1] - steady.end_s[0] == pytest.approx(1.5)


def test_a_lane_that_feeds_a_slower_one_is_ahead_of_it():
    fed = program([1.0, 3.0], [(0, 1, 0.0)], [(0, 0, 0.0), (1, 1, 0.0)])
    steady = steady_state(fed, fed.durations_s())
    assert steady.period_s == pytest.approx(3.0)
    assert steady.end_s[0] <= steady.start_s[1]


@pytest.mark.parametrize("difference", [1e-2, 1e-4, 1e-6])
def test_lanes_that_hardly_differ_need_not_repeat_steps_until_one_is_held_up(difference):
    """The second lane may end 50 s before the first, and gains so little that it would get there after thousands of steps."""
    near = program([1.0, 1.0 - difference], [(0, 1, -50.0)], [(0, 0, 0.0), (1, 1, 0.0)])
    growth, ends = eigenmode(near, near.durations_s(), walked(near, 1)[0])
    np.testing.assert_allclose(growth, 1.0)
    assert ends[1] - ends[0] == pytest.approx(-50 + 1 - difference)
    assert steady_state(near, near.durations_s()).period_s == pytest.approx(1.0)


def edges(count: int, within: bool) -> some.SearchStrategy[list[Edge]]:
    """Some edges among terms; those within a step lead from earlier to later ones."""
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b or not within]
    chosen = some.tuples(some.sampled_from(pairs), some.integers(0, 4)).map(lambda e: (*e[0], float(e[1])))
    return some.lists(chosen, max_size=8)


@settings(deadline=None)
@given(some.lists(some.integers(0, 6), min_size=5, max_size=5), edges(5, within=True), edges(5, within=False))
def test_terms_grow_as_they_do_after_many_steps(durations, waits, carries):
    """Steps repeat after as many as the lengths of cycles have in common, at most 60 of five terms; numbers are whole, so exactly."""
    made = program([float(d) for d in durations], waits, carries + [(i, i, 0.0) for i in range(5)])
    ends = walked(made, 560)
    growth, level = eigenmode(made, made.durations_s(), ends[0])
    np.testing.assert_allclose(growth, (ends[-1] - ends[-61]) / 60, atol=1e-9)
    # and the times that are found follow each other
    after = Recursion(made).step(made.durations_s(), level + 1e4)[1] - 1e4
    np.testing.assert_allclose(after, level + growth, atol=1e-8)
    # as a steady state they do if all keep the same pace: then nobody comes too late either
    assert np.all(Recursion(made).step(made.durations_s(), level + 1e4)[1] - 1e4 <= level + growth.max() + 1e-8)


def test_growth_is_that_of_equal_lanes_if_rounding_tells_them_apart():
    """Sums of the same durations in another order: neither lane is ahead of the other."""
    within = [(0, 2, 0.0), (2, 4, 0.0), (1, 3, 0.0), (3, 5, 0.0), (1, 4, 0.0)]
    equal = program([0.1, 0.3, 0.2, 0.2, 0.3, 0.1], within, [(4, 0, 0.0), (5, 1, 0.0)])
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    growth, ends = eigenmode(equal, equal.durations_s(), walked(equal, 1)[0])
    assert len(np.unique(growth)) == 1
    np.testing.assert_allclose(Recursion(equal).step(equal.durations_s(), ends + 1)[1], ends + 1 + growth)


LATE = {
    "a pipeline both ways": (
        lambda: st.workload("gpt", layers=8, hidden=256, heads=4, vocabulary=512, seq_len=128),
        "8x a100-sxm-80g",
        "pipeline=4,context=2,accumulation=10,precision=fp16-master,zero=1,schedule=dual-pipe",
        "torch-eager",
    ),
    "two stages": (
        lambda: st.workload("resnet-50"),
        "8x a100-sxm-80g",
        "data=4,pipeline=2,micro_batch=2,accumulation=4,precision=fp16-amp,zero=2,schedule=dual-pipe",
        "fsdp2",
    ),
    "hosts that hold up two kinds of devices": (
        lambda: st.workload("resnet-50"),
        "2x a100-sxm-80g + 2x v100-sxm2-32g",
        "data=4,micro_batch=2,accumulation=8,precision=fp16-amp,zero=0,checkpoint=every:2",
        "fsdp2",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_devices_that_gain_on_each_other_for_thousands_of_steps(name):
    """The pace is that of the device that others gain on, and all readers say so."""
    make, cluster, strategy, runtime = LATE[name]
    work = make()
    scheduled, simulated, closed = (read(work, cluster, strategy, runtime=runtime) for read in (st.schedule, st.simulate, st.estimate))
    assert simulated.step_time_s == pytest.approx(scheduled.step_time_s, rel=1e-9)
    assert closed.step_time_s == pytest.approx(scheduled.step_time_s, rel=0.15)
    for result in (scheduled, simulated):
        assert sum(result.breakdown_s.values()) == pytest.approx(result.step_time_s, rel=1e-9)
        assert min(result.breakdown_s.values()) >= 0
    made = lower(resolve(work, cluster, strategy, RUNTIMES[runtime])).program
    steady, ends = steady_state(made, made.durations_s()), walked(made, 90)
    growth = (ends[-1] - ends[-2])[made.kind != TermKind.HOST]
    assert growth.max() == pytest.approx(steady.period_s, rel=1e-9)
    assert growth.min() < steady.period_s * (1 - 1e-7)
    assert Recursion(made).step(made.durations_s(), steady.end_s + 1)[1] - 1 == pytest.approx(steady.end_s + steady.period_s)
