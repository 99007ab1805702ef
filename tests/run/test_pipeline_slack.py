"""Slack of a pipeline: what waits may slow down, and nothing else."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from simtrain.core.errors import InputError, UnsupportedError
from simtrain.run.pipeline_slack import PassCurve, schedule_slack, use_slack
from simtrain.run.power_cap import CapLaw

LAW = CapLaw(demand_w=400, static_w=100, compute_share=0.9)


def test_even_stages_have_no_slack():
    plan = use_slack([1.0, 1.0, 1.0], LAW, 80)
    assert plan.saved == 0
    assert plan.caps_w == (400, 400, 400)


@given(times=some.lists(some.floats(0.2, 1), min_size=2, max_size=8), waiting_w=some.floats(0, 400))
def test_the_slowest_stage_stays_and_nothing_costs_more(times, waiting_w):
    plan = use_slack(times, LAW, waiting_w)
    assert max(plan.times_s) <= max(times) * (1 + 1e-9)
    assert plan.caps_w[int(np.argmax(times))] == 400
    assert 0 <= plan.saved < 1


def test_more_imbalance_saves_more_and_dear_waiting_too():
    saved = [use_slack([1.0, t, t, t], LAW, 80).saved for t in (1.0, 0.95, 0.9, 0.85)]
    assert saved == sorted(saved)
    assert use_slack([1.0, 0.9], LAW, 200).saved > use_slack([1.0, 0.9], LAW, 50).saved


def test_it_is_the_best_of_all_combinations():
    times, waiting_w = [1.0, 0.8, 0.9], 90.0
    caps = np.linspace(150, 400, 26)

    def energy(choice):
        took = [t * float(LAW.slowdown(c)) for t, c in zip(times, choice, strict=True)]
        return np.inf if max(took) > 1 + 1e-12 else sum(c * t + waiting_w * (1 - t) for c, t in zip(choice, took, strict=True))

    full = energy([400.0] * 3)
    best = min(energy(choice) for choice in itertools.product(caps, repeat=3))
    plan = use_slack(times, LAW, waiting_w)
    assert plan.saved >= 1 - best / full - 1e-9
    assert plan.saved == pytest.approx(1 - best / full, abs=0.01)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="at least one stage"):
        use_slack([], LAW, 50)
    with pytest.raises(InputError, match="400 W of working"):
        use_slack([1.0], LAW, 500)


def curves(*times):
    return [PassCurve.under_caps(t, LAW) for t in times]


def test_one_stage_or_endless_waiting_power_leaves_nothing_to_save():
    assert schedule_slack(curves(1.0), curves(2.0), 4, 80).saved == pytest.approx(0)
    uneven = schedule_slack([PassCurve((t,), (400 * t,)) for t in (1, 0.5)], curves(2.0, 1.0), 3, 80)
    assert uneven.time_s == pytest.approx(uneven.full_s)


def test_a_step_keeps_its_length_and_even_stages_save_where_passes_wait():
    even = [schedule_slack(curves(1, 1, 1, 1), curves(2, 2, 2, 2), m, 80) for m in (4, 8, 16)]
    for slack, micro_batches in zip(even, (4, 8, 16), strict=True):
        assert slack.time_s == slack.full_s == pytest.approx((micro_batches + 3) * 3)
        assert min(slack.pass_s) >= 1 - 1e-9
    assert even[0].saved > even[1].saved > even[2].saved > 0
    # in GPipe with even stages every pass lies on a longest path, however much its stage waits
    assert schedule_slack(curves(1, 1, 1, 1), curves(2, 2, 2, 2), 4, 80, schedule="gpipe").saved == pytest.approx(0)


def test_many_micro_batches_save_what_the_steady_state_does():
    times = [1.0, 0.8, 0.9]
    steady = use_slack([3 * t for t in times], LAW, 80).saved
    assert schedule_slack(curves(*times), curves(*(2 * t for t in times)), 64, 80).saved == pytest.approx(steady, abs=0.015)


def test_no_choice_of_clocks_does_better_than_the_program():
    """Every combination of a coarse set of clocks for two stages and two micro-batches."""
    points = PassCurve((1.0, 1.2, 1.5), (400.0, 330.0, 300.0))
    slow = PassCurve((1.5, 1.8), (600.0, 520.0))
    waiting_w, limit_s = 90.0, 8.2
    slack = schedule_slack([points, slow], [points, slow], 2, waiting_w, time_s=limit_s)
    best = np.inf
    for f0, f1, b0, b1 in itertools.product(itertools.product(range(3), repeat=2), itertools.product(range(2), repeat=2), repeat=2):
        t = lambda curve, i: curve.times_s[i]  # noqa: E731
        begin1 = t(points, f0[0])
        end_f1 = begin1 + t(slow, f1[0])
        end_b1 = end_f1 + t(slow, b1[0])
        second = max(end_b1, begin1 + t(points, f0[1])) + t(slow, f1[1])
        last = second + t(slow, b1[1])
        end_b0 = max(end_b1, begin1 + t(points, f0[1])) + t(points, b0[0])
        if max(end_b0, last) + t(points, b0[1]) > limit_s:
            continue
        spent = [(points, i) for i in (*f0, *b0)] + [(slow, i) for i in (*f1, *b1)]
        best = min(best, sum(c.energies_j[i] - waiting_w * c.times_s[i] for c, i in spent) + 2 * waiting_w * limit_s)
    assert slack.energy_j <= best + 1e-6
    assert slack.energy_j > 0.97 * best


def test_bad_questions_about_a_schedule_are_named():
    with pytest.raises(InputError, match="cannot take 1"):
        schedule_slack(curves(1, 1), curves(2, 2), 4, 80, time_s=1.0)
    with pytest.raises(UnsupportedError, match="whole passes"):
        schedule_slack(curves(1, 1), curves(2, 2), 4, 80, schedule="zb-h1")
    with pytest.raises(InputError, match="2 and 1 were given"):
        schedule_slack(curves(1, 1), curves(2), 4, 80)
    with pytest.raises(InputError, match="an energy for each time"):
        PassCurve((1.0, 2.0), (3.0,))
    with pytest.raises(InputError, match="above zero"):
        PassCurve((1.0,), (0.0,))
