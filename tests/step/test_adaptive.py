"""Formats of layers: what they cost side by side, what rounding they add, and the fastest choice within a budget."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import InputError, StrategyError, UnknownNameError, UnsupportedError
from simtrain.core.precision import MIXABLE, DType, format_layers, precision
from simtrain.step.adaptive import LayerChoice, knapsack
from simtrain.step.rounding import MEAN_SQUARE, UNIT_ROUNDOFF, Exponents, variance

BLOCKS = "micro_batch=4,precision="


def test_mixed_recipes_are_written_and_read() -> None:
    recipe = precision("1*fp32+12*bf16-amp+1*tf32")
    assert [(n, r.name) for n, r in recipe.layers] == [(1, "fp32"), (12, "bf16-amp"), (1, "tf32")]
    assert format_layers(["fp32", *["bf16-amp"] * 12, "tf32"]) == recipe.name
    assert format_layers(["fp32"] * 3) == "fp32"
    assert recipe.arithmetic is DType.BF16
    assert not recipe.loss_scaling
    assert precision("1*fp32+1*fp16-amp").loss_scaling
    assert st.Strategy.parse(f"precision={recipe.name}").precision == recipe.name


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("0*fp32", StrategyError, "not NUMBER[*]RECIPE"),
        ("1*fp32+", StrategyError, "not NUMBER[*]RECIPE"),
        ("2*bf17-amp", UnknownNameError, "did you mean 'bf16-amp'"),
        ("1*fp32+1*bf16-master", StrategyError, "bf16-master cannot stand beside"),
        ("adaptive", StrategyError, "such as adaptive:0.01"),
        ("adaptive:none", StrategyError, "between 0 and 1, such as adaptive:0.01"),
        ("adaptive:1.5", StrategyError, "between 0 and 1"),
    ],
)
def test_texts_that_say_nothing_are_refused(text: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        precision(text)


def test_equal_recipes_side_by_side_are_one_recipe() -> None:
    for name in MIXABLE:
        one, many = (st.schedule("gpt2-small", "a100", BLOCKS + text) for text in (name, f"3*{name}+11*{name}"))
        assert many.step_time_s == pytest.approx(one.step_time_s, rel=1e-12)
        assert many.memory.allocated_bytes == one.memory.allocated_bytes


def test_every_layer_is_priced_in_its_own_format() -> None:
    """A step over layers of two recipes lies between them by as many layers as each has: layers add."""
    names = ("14*fp32", "1*fp32+6*bf16-amp+7*fp32", "1*fp32+12*bf16-amp+1*fp32")
    none, half, all_blocks = (st.schedule("gpt2-small", "a100", BLOCKS + n) for n in names)
    assert half.step_time_s == pytest.approx((none.step_time_s + all_blocks.step_time_s) / 2, rel=1e-3)
    assert none.memory.allocated_bytes > half.memory.allocated_bytes > all_blocks.memory.allocated_bytes


@pytest.mark.parametrize("form", ["data=2,zero=1", "pipeline=2,accumulation=4", "tensor=2"])
def test_readers_agree_on_mixtures(form: str) -> None:
    strategy = f"{form},micro_batch=2,precision=1*fp32+5*bf16-amp+8*tf32"
    results = [reader("gpt2-small", "8x a100", strategy) for reader in (st.estimate, st.schedule, st.simulate)]
    assert results[1].step_time_s == pytest.approx(results[2].step_time_s, rel=1e-4)
    assert results[0].step_time_s == pytest.approx(results[1].step_time_s, rel=0.15)


def test_a_budget_is_settled_by_every_reader_and_said() -> None:
    plan = st.choose_precision("gpt2-small", "a100", BLOCKS + "adaptive:0.02")
    assert plan.error <= plan.budget == 0.02
    assert plan.bound_s <= plan.time_s < plan.bound_s * 1.1
    for reader in (st.estimate, st.schedule, st.simulate):
        result = reader("gpt2-small", "a100", BLOCKS + "adaptive:0.02")
        assert f"precision={plan.strategy.precision}" in result.strategy
        assert any(line.startswith("formats of layers") for line in result.assumptions)


def test_a_larger_budget_is_never_slower_and_a_huge_one_is_the_fastest_recipe() -> None:
    plans = [st.choose_precision("gpt2-small", "a100", f"{BLOCKS}adaptive:{b}") for b in (1e-4, 1e-3, 5e-3, 2e-2, 0.9)]
    assert all(a.time_s >= b.time_s for a, b in itertools.pairwise(plans))
    fastest = min(st.estimate("gpt2-small", "a100", BLOCKS + r).step_time_s for r in ("fp32", "tf32", "bf16-amp"))
    assert st.estimate("gpt2-small", "a100", BLOCKS + "adaptive:0.9").step_time_s <= fastest * (1 + 1e-9)


def test_a_budget_below_what_fp32_leaves_names_that() -> None:
    with pytest.raises(StrategyError, match=r"leave an error of .*e-0.; give at least that"):
        st.estimate("gpt2-small", "a100", BLOCKS + "adaptive:0.0000001")


def exhaustive(choices: list[list[LayerChoice]], budget: float) -> float:
    sums = [(sum(c.variance for c in pick), sum(c.time_s for c in pick)) for pick in itertools.product(*choices)]
    return min(time_s for squared, time_s in sums if squared <= budget * (1 + 1e-12))


@settings(max_examples=80, deadline=None)
@given(
    some.lists(some.lists(some.tuples(some.floats(0.1, 10), some.floats(0.01, 1)), min_size=1, max_size=4), min_size=1, max_size=5),
    some.floats(0, 1),
)
def test_the_choice_fits_and_its_bound_holds_against_all_choices(layers: list[list[tuple[float, float]]], share: float) -> None:
    choices = [[LayerChoice(str(i), time_s, squared) for i, (time_s, squared) in enumerate(own)] for own in layers]
    least, most = (sum(pick(c.variance for c in own) for own in choices) for pick in (min, max))
    budget = least + share * (most - least)
    picked, bound_s = knapsack(choices, budget * (1 + 1e-12))
    best = exhaustive(choices, budget)
    assert sum(c.variance for c in picked) <= budget * (1 + 1e-9)
    assert bound_s <= best * (1 + 1e-9)
    assert best <= sum(c.time_s for c in picked) * (1 + 1e-9)


@pytest.mark.parametrize(("dtype", "kind"), [(DType.BF16, torch.bfloat16), (DType.FP16, torch.float16), (DType.FP32, torch.float32)])
def test_roundings_are_as_far_off_as_stated(dtype: DType, kind: torch.dtype) -> None:
    values = torch.from_numpy(2.0 ** np.random.default_rng(0).uniform(-3, 3, 200_000))
    off = (values.to(kind).double() / values - 1).square().mean().item()
    assert off == pytest.approx(variance(dtype), rel=0.03)
    assert UNIT_ROUNDOFF[dtype] == torch.finfo(kind).eps / 2
    assert 0.42 < math.sqrt(MEAN_SQUARE) < 0.43


def test_errors_of_sums_grow_as_the_root_of_their_length() -> None:
    rng = np.random.default_rng(1)
    for length in (64, 4096):
        a, b = (rng.standard_normal((300, length)) for _ in range(2))
        terms = (a * b).astype(np.float32)
        exact, total = (terms.astype(np.float64)).sum(axis=1), np.zeros(300, dtype=np.float32)
        for k in range(length):
            total += terms[:, k]
        off = np.sqrt(np.mean((total - exact) ** 2) / np.mean(exact**2))
        assert off < math.sqrt(length * variance(DType.FP32)) < 4 * off


def test_underflow_is_that_of_fp16() -> None:
    values = torch.exp2(torch.empty(200_000, dtype=torch.float64).uniform_(-45, -5, generator=torch.Generator().manual_seed(0)))
    exponents, counts = torch.unique(torch.floor(torch.log2(values)).int(), return_counts=True)
    histogram = Exponents(dict(zip(exponents.tolist(), counts.tolist(), strict=True)))
    for scale in (1.0, 2.0**10, 2.0**16):
        small = (values * scale).clamp(max=6e4).half().double()
        assert histogram.underflow(scale) == pytest.approx((small == 0).double().mean().item(), abs=0.02)
    tiny = Exponents({-20: 1000.0})
    off = torch.empty(100_000, dtype=torch.float64).uniform_(2.0**-20, 2.0**-19, generator=torch.Generator().manual_seed(1))
    measured = ((off.half().double() - off).square().sum() / off.square().sum()).item()
    assert tiny.variance(1.0) == pytest.approx(measured, rel=0.1)


def test_layers_whose_gradients_vanish_fall_back_from_fp16() -> None:
    fine, faint = Exponents({-20: 1.0}), Exponents({-60: 1.0, -20: 1.0})
    gradients = [fine] * 4 + [faint] * 3 + [fine] * 7
    plan = st.choose_precision("gpt2-small", "v100", BLOCKS + "adaptive:0.5", gradients=gradients)
    assert set(plan.fallbacks) == {4, 5, 6}
    assert all(plan.recipes[i] == "fp32" for i in (4, 5, 6))  # a V100 has no other
    assert "fp16-amp" in plan.recipes
    assert "keeps 3 layers from fp16" in plan.note
    without = st.choose_precision("gpt2-small", "v100", BLOCKS + "adaptive:0.5")
    assert set(without.recipes) == {"fp32"}  # nothing is known of underflow


@pytest.mark.parametrize(
    ("model", "strategy", "error", "match"),
    [
        (
            "gpt2-small",
            "precision=1*fp32+12*fp16-amp",
            StrategyError,
            "names 13 layers, but gpt2-small has 14: 1 embedding",
        ),
        ("resnet50", "precision=adaptive:0.1", UnsupportedError, "hands 16-bit tensors from layer to layer"),
        ("gpt2-small", "precision=adaptive:0.1,zero=3,data=2", UnsupportedError, "zero=3 is not modelled"),
        ("gpt2-small", "precision=1*tf32+13*fp32", UnsupportedError, "tf32"),
    ],
)
def test_what_cannot_be_is_refused(model: str, strategy: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        st.estimate(model, "2x v100", strategy)


def test_gradients_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(InputError, match="gradients are of 2 layers, but gpt2-small has 14"):
        st.choose_precision("gpt2-small", "a100", BLOCKS + "adaptive:0.1", gradients=[Exponents({0: 1.0})] * 2)
    with pytest.raises(InputError, match="at least one above zero"):
        Exponents({})
    with pytest.raises(StrategyError, match="has no budget to choose within: give adaptive"):
        st.choose_precision("gpt2-small", "a100", "precision=fp32")
