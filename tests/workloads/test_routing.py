"""How choices are spread over experts: closed forms of the fullest rank, what is cut off and dropped, and what follows for a step."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import InputError, UnsupportedError
from simtrain.core.runtimes import runtime
from simtrain.core.workload import Collective, Form, OperatorKind, Workload
from workloads.transformer.routing import dropped_share, expert_shares, fullest_over_mean

SIZES = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "vocabulary": 512, "experts": 8, "top_k": 2, "expert_ffn": 96}


def mixture(**options: object) -> Workload:
    return st.workload("llama", seq_len=128, **(SIZES | options))


def products(work: Workload) -> float:
    """Rows of every expert product of a block, with their number of experts."""
    block = next(layer for layer in work.layers if layer.block)
    return sum(
        op.dims[0].size(2, 128) * op.dims[1].size(2, 128) for op in block.forward if op.kind is OperatorKind.BATCHED_GEMM
    )  # all forward products have rows in this place


@given(some.floats(0.0, 4.0), some.integers(2, 64), some.integers(1, 8))
def test_shares_sum_to_one_fall_and_none_is_larger_than_one_choice_a_token(exponent, experts, top_k):
    top_k = min(top_k, experts)
    shares = expert_shares(f"zipf:{exponent}", experts, top_k)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) <= 1 / top_k * (1 + 1e-9)
    assert all(a >= b * (1 - 1e-9) for a, b in pairwise(shares))


def test_the_fullest_of_two_equal_ranks_is_half_a_deviation_over_root_pi_ahead():
    """Of two normal values with deviation s the larger is s / sqrt(pi) above the mean; their difference is all that chance moves here."""
    choices = 1024
    deviation = math.sqrt(0.25 / (2 * choices))
    assert fullest_over_mean("uniform", 8, 2, 2, choices) == pytest.approx(1 + 2 * deviation / math.sqrt(math.pi), rel=2e-3)


def test_with_one_expert_a_rank_the_first_decides_and_measured_shares_stay_where_they_are():
    many = 10**9
    shares = expert_shares("zipf:0.7", 16, 1)
    assert fullest_over_mean("zipf:0.7", 16, 1, 16, many) == pytest.approx(16 * max(shares), rel=1e-3)
    assert fullest_over_mean("shares:4-1-1-1-1-1-1-2", 8, 1, 4, many) == pytest.approx(4 * 5 / 12, rel=1e-3)
    assert fullest_over_mean("uniform", 8, 1, 4, many) == pytest.approx(1, rel=1e-3)


def test_what_is_dropped_is_what_exceeds_the_room():
    assert dropped_share("shares:3-1-1-1", 4, 1, 1.0) == pytest.approx(3 / 6 - 1 / 4)
    assert dropped_share("uniform", 8, 2, 1.0) == pytest.approx(0)


def test_a_skewed_router_slows_the_step_and_takes_memory_by_its_expectation():
    skewed, even = mixture(spread="zipf:0.5"), mixture()
    load = fullest_over_mean("zipf:0.5", 8, 2, 4, 128 * 2)
    forms = [work.reform(Form(expert=4)) for work in (skewed, even) if work.reform]
    assert products(forms[0]) == pytest.approx(load * products(forms[1]))
    crossing = [[op.touched(2, 128) for op in f.layers[1].forward if op.collective is Collective.ALL_TO_ALL] for f in forms]
    assert crossing[0] == pytest.approx([load * size for size in crossing[1]])
    strategy = "data=4,expert=4,precision=bf16,micro_batch=64"
    fast_host = st.runtime("torch-eager").with_(launch_s=1e-6)  # so that devices set the pace
    results = [st.schedule(work, "4x a100-sxm-80g", strategy, runtime=fast_host) for work in (skewed, even)]
    assert results[0].step_time_s > results[1].step_time_s
    assert results[0].memory.allocated_bytes > results[1].memory.allocated_bytes
    assert skewed.model_flops(2) == even.model_flops(2)


def test_rooms_are_padded_and_equal_and_no_work_of_the_model():
    roomy, even = mixture(capacity=1.5, spread="zipf:1"), mixture()
    assert roomy.reform is not None
    assert products(roomy) == pytest.approx(1.5 * products(even))
    assert products(roomy.reform(Form(expert=4))) == pytest.approx(1.5 * products(even))
    assert roomy.model_flops(2) == pytest.approx(even.model_flops(2))
    assert any("dropped" in text for text in roomy.assumptions)


def test_a_loop_over_experts_costs_the_host_a_launch_for_each():
    grouped, loop = (runtime("megatron").with_(grouped_experts=flag) for flag in (True, False))
    work = mixture(experts=64)
    slow, fast = (st.schedule(work, "1x h100-sxm", "precision=bf16", runtime=r) for r in (loop, grouped))
    assert slow.step_time_s > 2 * fast.step_time_s  # so small a model waits for its host


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spread": "zapf:1"}, "uniform, zipf:EXPONENT or shares"),
        ({"spread": "zipf:steep"}, "no distribution"),
        ({"spread": "shares:1-2-3"}, "3 shares for 8 experts"),
        ({"spread": "uniform", "load": 1.2}, "one of the two"),
        ({"capacity": -1.0}, "capacity must"),
        ({"capacity": 1.2, "load": 1.2}, "give spread instead"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        mixture(**options)


def test_the_real_module_refuses_to_drop():
    from workloads.transformer.module import Transformer
    from workloads.transformer.presets import spec

    with pytest.raises(UnsupportedError, match="drops no choices"):
        Transformer(spec("llama", **(SIZES | {"capacity": 1.25, "max_positions": 128})))
