"""Runs with compression or rare synchronisation: a loss needs their effect stated, steps and tokens do not."""

import pytest

import simtrain as st
from simtrain.core.errors import InputError, UnsupportedError
from simtrain.run.course import Phase, Target
from simtrain.run.loss_laws import CHINCHILLA
from simtrain.run.predict_run import simulate_run

BOX, BASE = "4x rtx-3090", "data=4,micro_batch=8,precision=bf16-amp"
INEXACT = ["compression=8-bit", "low_communication=diloco:50"]


@pytest.fixture(scope="module")
def gpt():
    return st.workload("gpt", layers=4, hidden=256, heads=4, vocabulary=2048, seq_len=256)


@pytest.mark.parametrize("exchange", INEXACT)
@pytest.mark.parametrize(
    "question",
    [{"until": Target(loss=4.0)}, {"until": Target(steps=100), "law": "kaplan"}, {"until": Target(loss=4.0), "law": CHINCHILLA}],
)
def test_a_loss_is_refused_until_the_effect_is_stated(gpt, exchange, question):
    with pytest.raises(UnsupportedError, match=f"what {exchange} does to convergence is not modelled.*give efficiency="):
        simulate_run(gpt, BOX, f"{BASE},{exchange}", **question)


@pytest.mark.parametrize("exchange", INEXACT)
def test_half_the_efficiency_takes_twice_the_tokens(gpt, exchange):
    whole, half = (simulate_run(gpt, BOX, f"{BASE},{exchange}", until=Target(loss=4.5), efficiency=e) for e in (1.0, 0.5))
    exact = simulate_run(gpt, BOX, BASE, until=Target(loss=4.5))
    assert whole.steps == exact.steps
    assert half.steps == pytest.approx(2 * whole.steps, abs=2)
    assert half.batch_overhead == pytest.approx(whole.batch_overhead, rel=1e-2)
    assert any(f"{exchange}: a token brings 0.5" in line for line in half.assumptions)


@pytest.mark.parametrize("exchange", INEXACT)
def test_steps_and_tokens_need_no_effect(gpt, exchange):
    result = simulate_run(gpt, BOX, f"{BASE},{exchange}", until=Target(steps=100))
    assert result.steps == 100
    assert any("does to the loss that they reach is not modelled" in line for line in result.assumptions)
    assert simulate_run(gpt, BOX, f"{BASE},{exchange}", until=Target(tokens=1e6)).tokens >= 1e6


def test_a_step_that_was_read_before_says_how_it_exchanges(gpt):
    step = st.schedule(gpt, BOX, f"{BASE},compression=1-bit")
    with pytest.raises(UnsupportedError, match="compression=1-bit"):
        simulate_run(step, until=Target(loss=4.5), parameters=1e7)


@pytest.mark.parametrize(
    ("strategy", "question", "message"),
    [
        (BASE, {"until": Target(loss=4.5), "efficiency": 0.9}, "the strategy has neither"),
        (f"{BASE},compression=8-bit", {"until": Target(steps=10), "efficiency": 0.9}, "no loss is asked for"),
        (f"{BASE},compression=8-bit", {"until": Target(loss=4.5), "efficiency": 1.1}, "above 0 and at most 1, not 1.1"),
    ],
)
def test_an_efficiency_without_effect_is_refused(gpt, strategy, question, message):
    with pytest.raises(InputError) as caught:
        simulate_run(gpt, BOX, strategy, **question)
    assert message in str(caught.value)


def test_one_efficiency_does_not_fit_different_phases(gpt):
    phases = [Phase("exact", steps=10, strategy=BASE)]
    with pytest.raises(UnsupportedError, match="only some phases"):
        simulate_run(gpt, BOX, f"{BASE},compression=8-bit", until=Target(loss=4.5), phases=phases, efficiency=0.9)
