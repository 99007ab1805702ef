"""Collectives beside products: closed forms of what stays exposed, joined products keep the work, readers agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import InputError, UnsupportedError
from simtrain.core.polynomial import ONE
from simtrain.core.precision import precision
from simtrain.core.runtimes import runtime
from simtrain.core.workload import Collective, Dim, Form, Operator, OperatorKind, Role, Tensor
from simtrain.planner.arrays.compose import estimate_block
from simtrain.planner.arrays.tables import Tables
from simtrain.planner.space import Wishes, blocks
from simtrain.step.join import joined_operators
from simtrain.step.narrow import narrowed_layers
from simtrain.step.overlap import exposed_s
from simtrain.step.specialize import concrete_layers

RANKS = 4
TIMES = some.floats(1e-6, 1.0)
SIZES = {"layers": 8, "hidden": 1024, "heads": 16, "vocabulary": 8192, "ffn": 4096}
FAST_HOST = {"launch_s": 2e-6}
"""So that devices set the pace of models as small as these."""

NEMO = runtime("nemo").with_(**FAST_HOST)
MEGATRON = runtime("megatron").with_(**FAST_HOST)


def product(reads: str, writes: str, *, over_tokens: bool = False) -> Operator:
    roles = (Role.BATCH, Role.FFN, Role.HIDDEN, Role.TOKENS) if over_tokens else (Role.BATCH, Role.TOKENS, Role.FFN, Role.HIDDEN)
    return Operator("product", OperatorKind.GEMM, (reads, "w"), (Tensor(writes, ONE),), dims=tuple(Dim(r, ONE) for r in roles))


def moved(kind: Collective, reads: str, writes: str, *, overlaps: bool = False, group: str = "tensor") -> Operator:
    return Operator("moved", OperatorKind.COLLECTIVE, (reads,), (Tensor(writes, ONE),), collective=kind, group=group, overlaps=overlaps)


@given(alone_s=TIMES, product_s=TIMES)
def test_a_gather_in_pieces_waits_for_what_exceeds_all_products_but_the_first_pieces(alone_s, product_s):
    operators = [moved(Collective.ALL_GATHER, "x", "whole"), product("whole", "y")]
    exposed = exposed_s(operators, np.array([alone_s, product_s]), 0, NEMO, RANKS, block=True)
    # the device ends when the last piece is there and multiplied, or when all products are done
    assert exposed + product_s == pytest.approx(max(product_s, alone_s + product_s / RANKS))
    assert exposed_s(operators, np.array([alone_s, product_s]), 0, NEMO, RANKS, block=False) == alone_s, "head and embedding"
    late = [operators[0], product("whole", "dw", over_tokens=True)]
    assert exposed_s(late, np.array([alone_s, product_s]), 0, NEMO, RANKS, block=True) == alone_s, "a sum over all tokens waits"


@given(alone_s=TIMES, product_s=TIMES)
def test_a_scatter_in_pieces_leaves_its_last_piece(alone_s, product_s):
    operators = [product("x", "partial"), moved(Collective.REDUCE_SCATTER, "partial", "own")]
    times = np.array([product_s, alone_s])
    free = NEMO.with_(scatter_share=0.0)
    exposed = exposed_s(operators, times, 1, free, RANKS, block=True)
    pieces = NEMO.tensor.scatter_pieces
    assert exposed + product_s == pytest.approx(max(product_s + alone_s / pieces, product_s / pieces + alone_s))
    slower = exposed_s(operators, times, 1, NEMO, RANKS, block=True)
    stretched_s = product_s * (1 / (1 - NEMO.tensor.scatter_share) - 1)
    assert exposed <= slower <= exposed + stretched_s + 1e-12, "a product on fewer multiprocessors"
    assert exposed_s(operators, times, 1, runtime("megatron"), RANKS, block=True) == alone_s


@given(alone_s=TIMES, product_s=TIMES)
def test_in_bulk_both_run_and_multiprocessors_are_shared(alone_s, product_s):
    operators = [moved(Collective.REDUCE_SCATTER, "dx", "own", overlaps=True), product("dy", "dw", over_tokens=True)]
    share = 0.25
    exposed = exposed_s(operators, np.array([alone_s, product_s]), 0, runtime("megatron").with_(hidden_share=share), RANKS, block=True)
    # beside the collective the product goes on at what is left of the device
    meanwhile = (1 - share) * alone_s
    whole_s = alone_s if meanwhile >= product_s else alone_s + (product_s - meanwhile)
    assert exposed + product_s == pytest.approx(whole_s)


def concrete(recipe: str, **form: object):
    work = st.workload("llama", seq_len=256, kv_heads=4, **SIZES)
    layers = concrete_layers(work.reform(Form(**form)), precision(recipe), NEMO)
    return narrowed_layers(layers)[1]


@pytest.mark.parametrize("recipe", ["bf16-master", "fp8"])
@pytest.mark.parametrize("form", [{}, {"tensor": 2}, {"tensor": 4, "sequence_parallel": True, "regather": True, "overlap": True}])
def test_products_of_one_input_become_one_without_a_sum(recipe, form):
    block = concrete(recipe, **form)
    for operators, products, fewer in ((block.forward, 4, 0), (block.backward, 8, 3)):
        joined = joined_operators(operators)
        gemms = [op for op in joined if op.kind is OperatorKind.GEMM]
        assert len(gemms) == products, "queries, keys and values; what leaves attention; gate and up; down"
        assert sum(op.flops(2, 256) for op in joined) == sum(op.flops(2, 256) for op in operators)
        for op in gemms:
            assert op.flops(2, 256) == 2 * np.prod([d.size(2, 256) for d in op.dims])
        lost = {op.name for op in operators if op.kind is OperatorKind.ELEMENTWISE} - {op.name for op in joined}
        assert len(lost) == fewer, "two sums behind queries, keys and values, one behind gate and up"
        written = {w.name for op in joined for w in op.writes} | block.saved | {"x", "dy"}
        needed = {r for op in joined if op.kind is OperatorKind.COLLECTIVE for r in op.reads}
        assert needed <= written, "what is moved has been made"


def test_separate_modules_stay_separate():
    work = st.workload("llama", seq_len=256, kv_heads=4, **SIZES)
    times = [
        st.estimate(work, "a100-sxm-80g", "micro_batch=8,precision=bf16-master", runtime=runtime("megatron").with_(joined_products=j))
        for j in (True, False)
    ]
    assert times[0].step_time_s < times[1].step_time_s
    assert times[0].memory.allocated_bytes == times[1].memory.allocated_bytes


STRATEGY = "data=2,tensor=4,pipeline=2,micro_batch=4,accumulation=8,sequence_parallel=true,precision=bf16-master,zero=1"


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_readers_agree_and_overlap_saves_no_more_than_what_was_exposed(family):
    options = {"kv_heads": 16} if family == "llama" else {}
    work = st.workload(family, seq_len=1024, **(SIZES | options))
    found = {}
    for name, framework in (("megatron", MEGATRON), ("nemo", NEMO)):
        closed, frozen, fluid = (
            read(work, "16x a100-sxm-80g", STRATEGY, runtime=framework) for read in (st.estimate, st.schedule, st.simulate)
        )
        assert closed.step_time_s == pytest.approx(frozen.step_time_s, rel=0.02)
        assert fluid.step_time_s == pytest.approx(frozen.step_time_s, rel=0.05)
        found[name] = closed
    whole, pieces = found["megatron"], found["nemo"]
    saved = whole.step_time_s - pieces.step_time_s
    assert 0.02 * whole.step_time_s < saved < whole.breakdown_s["communication"]


def test_arrays_know_the_overlap():
    work, cluster = st.workload("gpt", seq_len=1024, **SIZES), st.cluster("16x a100-sxm-80g")
    fixed = {"tensor": 4, "sequence_parallel": True, "pipeline": 2, "data": 2, "micro_batch": 2, "precision": "bf16-master"}
    framework = NEMO.with_(overlap_gather=False)  # gathers beside the forward pass are read one by one
    (block, *_), *_ = blocks(work, cluster, 32, [framework], Wishes(None, None, None, "adamw", 16, fixed))
    found = estimate_block(Tables(work, cluster), block)
    compared = 0
    for i in np.flatnonzero(found.covered)[:4].tolist():
        exact = st.schedule(work, cluster, block.candidate(i).strategy, runtime=framework)
        assert found.step_time_s[i] == pytest.approx(exact.step_time_s, rel=found.within[i])
        compared += 1
    assert compared


def test_partial_sums_travel_in_the_format_of_their_product():
    work = st.workload("gpt", seq_len=1024, **SIZES)
    how = "tensor=8,sequence_parallel=true,micro_batch=4,accumulation=2,precision=fp8"
    wide, narrow = (st.estimate(work, "8x h100-sxm", how, runtime=MEGATRON.with_(narrow_scatter=narrow)) for narrow in (False, True))
    assert narrow.step_time_s < wide.step_time_s


def test_pieces_need_a_peer_link_between_all_ranks_of_a_group():
    work = st.workload("gpt", seq_len=256, **SIZES)
    with pytest.raises(UnsupportedError, match="use tensor=8"):
        st.estimate(work, "2x dgx-a100-80gb", "tensor=16,sequence_parallel=true,precision=bf16-master", runtime="nemo")
    with pytest.raises(InputError, match="hidden_share"):
        NEMO.with_(hidden_share=1.0)
    with pytest.raises(InputError, match="scatter_pieces"):
        NEMO.with_(scatter_pieces=-1)
