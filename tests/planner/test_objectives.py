"""Objectives, limits and the robust choice, by hand."""

import dataclasses
from math import exp, pi, sqrt

import pytest

import simtrain as st
from simtrain.core.errors import InputError, UnknownNameError
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import Strategy
from simtrain.planner.objectives import OBJECTIVES, Judge, Limits, Weights
from simtrain.planner.robust import ModelError, Outlook, order, outlooks, settled
from simtrain.planner.space import Candidate
from tests.report.conftest import make_result

BOX = "4x rtx-3090"
SURE = ModelError(compute=0, memory_bandwidth=0, link=0, host=0, own=0, memory=0)


def result(*, step_s=1.0, batch=64, memory=10.0, energy=100.0, cost=0.5, power=1000.0, **changes):
    made = make_result(
        step_time_s=step_s,
        global_batch=batch,
        samples_per_s=batch / step_s,
        tokens_per_s=batch * 1024 / step_s,
        energy_j=energy,
        cost_usd=cost,
        power_w=power,
        breakdown_s={"compute": 0.75 * step_s, "communication": 0.25 * step_s},
        **changes,
    )
    return dataclasses.replace(made, memory=dataclasses.replace(made.memory, device_bytes=memory, capacity_bytes=24.0))


def test_each_objective_is_what_its_name_says():
    r = result(step_s=2.0, batch=8, memory=3.0, energy=40.0, cost=0.1)
    assert {name: value(r) for name, value in OBJECTIVES.items()} == pytest.approx(
        {
            "throughput": -4.0,
            "step_time": 2.0,
            "memory": 3.0,
            "energy": 5.0,
            "cost": 0.0125,
            "tokens_per_dollar": 0.1 / (8 * 1024),
        }
    )


def test_balanced_is_the_normalized_score_by_hand():
    fast = result(step_s=1.0, batch=100, memory=20.0)  # 100 samples/s
    frugal = result(step_s=1.0, batch=50, memory=10.0)  # 50 samples/s
    judge = Judge(("balanced",), Weights(throughput=0.5, memory=0.3, convergence=0.2, noise_batch=100))
    quality = (1 / 2, 1 / 1.5)  # 1 / (1 + batch / noise), the best of them is 2/3
    by_hand = (0.5 * 1 + 0.3 * 0.5 + 0.2 * quality[0] / quality[1], 0.5 * 0.5 + 0.3 * 1 + 0.2 * 1)
    assert judge.scores([fast, frugal]) == pytest.approx(by_hand)
    assert judge.ranked([frugal, fast])[0] is fast
    heavy = Judge(("balanced",), Weights(throughput=0, memory=1, convergence=0))
    assert heavy.ranked([fast, frugal])[0] is frugal


def test_the_front_of_three_aims_by_hand():
    a = result(step_s=1.0, memory=20.0, energy=100.0)
    b = result(step_s=2.0, memory=10.0, energy=100.0)
    c = result(step_s=2.0, memory=20.0, energy=50.0)
    beaten = result(step_s=2.0, memory=20.0, energy=100.0)
    found = Judge(("throughput", "memory", "energy")).front([beaten, c, b, a])
    assert found[0] is a
    assert {id(r) for r in found} == {id(a), id(b), id(c)}


def test_limits_by_hand():
    r = result(step_s=2.0, batch=8, cost=0.1, power=500.0, memory=12.0)  # 8192 tokens a step
    tokens = 8192 * 1000.0  # a thousand steps: 2000 s, 100 USD
    assert not Limits(power_w=500, budget_usd=100, deadline_s=2000, tokens=tokens, memory_margin=0.5).broken_by(r)
    assert "499 W" in Limits(power_w=499).broken_by(r)
    assert "99 USD" in Limits(budget_usd=99, tokens=tokens).broken_by(r)
    assert "longer than 1999 s" in Limits(deadline_s=1999, tokens=tokens).broken_by(r)
    assert "margin of 51%" in Limits(memory_margin=0.51).broken_by(r)
    ((_, times),) = Limits(deadline_s=1000, tokens=tokens).asked_of(r)
    assert times == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"deadline_s": 5.0}, "a deadline needs the length"),
        ({"budget_usd": 5.0}, "a budget needs the length"),
        ({"memory_risk": 1.0}, "probability from 0 to below 1"),
        ({"deadline_s": -1.0}, "deadline_s must be a number from 0 on"),
        ({"power_w": float("nan")}, "power_w must be a number from 0 on"),
    ],
)
def test_limits_that_cannot_be(given, match):
    with pytest.raises(InputError, match=match):
        Limits(**given)


def test_a_risk_of_memory_is_a_margin():
    error = ModelError(memory=0.1)
    margin = settled(Limits(memory_risk=0.05), error).memory_margin
    assert margin == pytest.approx(1 - exp(-0.1 * 1.6449), abs=1e-4)
    assert error.runs_out(result(memory=24.0 * (1 - margin))) == pytest.approx(0.05)
    assert settled(Limits(memory_risk=0.05, memory_margin=0.3), error).memory_margin == 0.3
    assert SURE.runs_out(result(memory=25.0)) == 1
    assert SURE.runs_out(result(memory=23.0)) == 0


@pytest.fixture(scope="module")
def small():
    return st.workload("gpt", layers=2, hidden=256, heads=4, vocabulary=512, seq_len=128)


def seen(small, texts, *, error, jitter=0.0, **changes):
    where, launcher = st.cluster(BOX), runtime("torch-eager")
    finalists = [
        (Candidate(Strategy.parse(t), launcher), dataclasses.replace(st.schedule(small, where, t, runtime=launcher), **changes))
        for t in texts
    ]
    return outlooks(small, where, finalists, error=error, jitter=jitter), [r for _, r in finalists]


TEXTS = ("data=4,micro_batch=8", "data=4,micro_batch=2,accumulation=4")


def test_without_errors_the_best_guess_holds(small):
    found, results = seen(small, TEXTS, error=SURE)
    for o, r in zip(found, results, strict=True):
        assert (o.expected_s, o.worst_decile_s) == pytest.approx((r.step_time_s, r.step_time_s))
    assert [o.chance_best for o in found] == [1.0, 0.0]


def test_an_error_of_its_own_is_log_normal(small):
    (o, *_), (r, *_) = seen(small, TEXTS, error=dataclasses.replace(SURE, own=0.1))
    assert o.expected_s == pytest.approx(r.step_time_s * exp(0.1**2 / 2), rel=0.01)
    assert o.worst_decile_s == pytest.approx(r.step_time_s * exp(1.2816 * 0.1), rel=0.01)


def test_what_all_share_does_not_change_who_is_best_where_all_respond_alike(small):
    found, _ = seen(small, (TEXTS[0], TEXTS[0]), error=dataclasses.replace(SURE, compute=0.2, link=0.2))
    assert found[0].expected_s == found[1].expected_s


def test_slow_links_hurt_what_communicates(small):
    found, results = seen(small, ("data=4,micro_batch=1", "data=1,micro_batch=4"), error=dataclasses.replace(SURE, link=0.3))
    grown = [o.worst_decile_s / r.step_time_s for o, r in zip(found, results, strict=True)]
    assert grown[0] > 1.05
    assert grown[1] == pytest.approx(1.0)


def test_jitter_lengthens_computation_by_the_slowest_rank(small):
    (o,), (r,) = seen(
        small, TEXTS[:1], error=SURE, jitter=0.1, breakdown_s={"compute": 0.5, "communication": 0.5}, step_time_s=1.0, devices=2
    )
    assert o.expected_s == pytest.approx(r.step_time_s * (1 + 0.5 * 0.1 / sqrt(pi)), rel=1e-3)


def test_the_order_is_by_what_was_asked_for():
    def outlook(expected_s, worst_s):
        return Outlook("data=1", "torch-eager", 1.0, expected_s, worst_s, 0.5, 0.0)

    found = (outlook(1.0, 1.5), outlook(1.1, 1.2))
    same = [result(), result()]
    assert order(found, same, "throughput", "expected") == [0, 1]
    assert order(found, same, "throughput", "worst_decile") == [1, 0]
    assert order(found, [result(cost=3.0), result(cost=1.0)], "cost", "expected") == [1, 0]


def test_a_robust_plan_is_in_the_order_of_its_outlooks(small):
    found = st.plan(small, BOX, 32, precisions=["fp32"], robust="worst_decile", jitter=0.02)
    worst = [o.worst_decile_s for o in found.outlooks]
    assert worst == sorted(worst)
    assert [o.strategy for o in found.outlooks] == [r.strategy for r in found.ranked[: len(worst)]]
    assert sum(o.chance_best for o in found.outlooks) == pytest.approx(1.0)
    assert any("worst decile" in n for n in found.notes)


def test_robust_choices_that_cannot_be(small):
    with pytest.raises(UnknownNameError, match="worst_decile"):
        st.plan(small, BOX, 32, robust="worst_decil")
    with pytest.raises(InputError, match="goes with the step time"):
        st.plan(small, BOX, 32, objective="memory", robust="expected")
    with pytest.raises(InputError, match="robust choice only"):
        st.plan(small, BOX, 32, jitter=0.1)
    with pytest.raises(InputError, match="from 0 to below 1"):
        ModelError(link=1.5)


def test_a_deadline_that_nothing_meets_says_how_near_the_nearest_is(small):
    fast = st.plan(small, BOX, 32, precisions=["fp32"]).best
    tokens = fast.tokens_per_s * 100.0
    found = st.plan(small, BOX, 32, precisions=["fp32"], limits=Limits(deadline_s=50.0, tokens=tokens), explain=True)
    assert found.best is None
    (line,) = found.advice
    assert "takes longer than 50.0 s" in line
    assert float(line.split("the nearest takes ")[1].split(" times")[0]) == pytest.approx(2.0, rel=0.1), (
        "schedule and simulate differ a little"
    )
    assert st.plan(small, BOX, 32, precisions=["fp32"], limits=Limits(deadline_s=101.0, tokens=tokens)).best is not None


def test_what_fits_under_no_eager_pytorch_is_found_under_runtimes_that_divide():
    found = st.plan("llama3-8b", "8x a100-sxm-80g", 8, fixed={"micro_batch": 1, "checkpoint": "full"})
    assert found.best is not None
    assert set(found.by_runtime) == {"megatron", "fsdp2"}


def test_more_devices_and_resources_are_priced(small):
    reasons = st.why(small, BOX, "data=2,micro_batch=2,accumulation=6")
    (devices,) = [w for w in reasons.resources if "more device" in w.change]
    assert devices.change == "1 more device (data=3)"
    faster = st.schedule(small, BOX, "data=3,micro_batch=2,accumulation=4").step_time_s
    assert devices.step_time_s == pytest.approx(faster)


@pytest.mark.parametrize("name", ["throughput", "noise_batch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_weights_are_numbers(name, value):
    with pytest.raises(InputError, match="weights must be numbers from 0 on"):
        Weights(**{name: value})
