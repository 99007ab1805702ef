"""Slack of a pipeline: what waits may slow down, and nothing else."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from simtrain.core.errors import InputError
from simtrain.run.pipeline_slack import use_slack
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
