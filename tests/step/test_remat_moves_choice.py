"""`checkpoint=optimal` beside `offload=activations`: fits what it is given, and adds what it says."""

import pytest

import simtrain as st
from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.step.remat_moves_choice import MoveQuestion
from simtrain.step.setting import resolve

MACHINE = "dgx-2"
GPT = {"layers": 8, "hidden": 1024, "heads": 16, "vocabulary": 4096, "seq_len": 1024}
STRATEGY = st.Strategy(micro_batch=8, precision="fp16-amp")


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2}, {"offload": "optimizer+activations"}])
def test_it_fits_and_is_no_slower_than_recomputing_or_moving_alone(changes):
    gpt = st.workload("gpt", **GPT)
    base = STRATEGY.with_(offload="activations").with_(**changes)
    unmoved = base.with_(offload="optimizer" if "optimizer" in base.offload else "none")
    whole = st.schedule(gpt, MACHINE, unmoved)
    least = st.schedule(gpt, MACHINE, unmoved.with_(checkpoint="full"))
    budget = (0.4 * whole.memory.device_bytes + 0.6 * least.memory.device_bytes) / 2**30
    chosen = st.schedule(gpt, MACHINE, base.with_(checkpoint=f"optimal:{budget}GiB"))
    alone = st.schedule(gpt, MACHINE, unmoved.with_(checkpoint=f"optimal:{budget}GiB"))
    assert chosen.memory.device_bytes <= budget * 2**30 * (1 + 1e-9)
    assert "activations(" in chosen.strategy
    assert chosen.step_time_s < alone.step_time_s
    all_moved = st.schedule(gpt, MACHINE, base)
    assert chosen.step_time_s < all_moved.step_time_s


def test_the_step_takes_as_much_longer_as_the_choice_says():
    gpt = st.workload("gpt", **GPT)
    question = MoveQuestion.of(resolve(gpt, MACHINE, STRATEGY.with_(offload="activations")))
    whole = st.schedule(gpt, MACHINE, STRATEGY)
    for share in (0.6, 0.75, 0.9):
        plan = question.within(whole.memory.device_bytes * share)
        assert plan is not None
        result = st.schedule(gpt, MACHINE, question.strategy(plan))
        assert result.memory.device_bytes <= whole.memory.device_bytes * share * (1 + 1e-9)
        assert result.step_time_s - whole.step_time_s == pytest.approx(plan.added_s, rel=0.02, abs=1e-4)


def test_a_budget_below_the_smallest_names_it():
    gpt = st.workload("gpt", **GPT)
    with pytest.raises(StrategyError, match=r"smallest choice of blocks to recompute or move takes [\d.]+ GiB"):
        st.schedule(gpt, MACHINE, STRATEGY.with_(offload="activations", checkpoint="optimal:1GiB"))


def test_what_fits_is_left_as_it_is():
    gpt = st.workload("gpt", **GPT)
    result = st.schedule(gpt, MACHINE, STRATEGY.with_(offload="activations", checkpoint="optimal"))
    assert "activations" not in result.strategy
    assert any("all fits as it is" in line for line in result.assumptions)


def test_the_curve_of_recomputation_is_about_recomputation():
    with pytest.raises(UnsupportedError, match="recomputation alone"):
        st.checkpoint_curve(st.workload("gpt", **GPT), MACHINE, STRATEGY.with_(offload="activations"))
