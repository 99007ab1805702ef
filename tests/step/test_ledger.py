"""Memory: nothing leaks over a step, published formulas hold, policies change what they should."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.precision import precision
from simtrain.core.result import MemoryKind
from simtrain.core.runtime import RUNTIMES
from simtrain.step.occupancy import COLUMN
from simtrain.step.remat import segments
from simtrain.step.specialize import concrete_layers, recomputed_operators
from simtrain.step.states import holds_gradients, persistent
from tests.step.books import layout, ledger_of

SIZES = {"layers": 5, "hidden": 64, "heads": 4, "vocabulary": 512}
families = some.sampled_from(["gpt", "llama", "bert"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=families,
    recipe=some.sampled_from(["fp32", "fp16-amp", "bf16"]),
    checkpoint=some.sampled_from(["none", "full", "sqrt", "every:2", "every:3"]),
    accumulation=some.sampled_from([1, 2, 4]),
    replicas=some.sampled_from([1, 4]),
    runtime=some.sampled_from(["torch-eager", "torch-eager-cpu"]),
    fused=some.booleans(),
)
def test_only_states_and_gradients_survive_a_step(family, recipe, checkpoint, accumulation, replicas, runtime, fused):
    workload = st.workload(family, seq_len=32, **SIZES)
    strategy = st.Strategy(
        data=replicas, micro_batch=2, accumulation=accumulation, precision=recipe, checkpoint=checkpoint, optimizer="sgd"
    )
    behaviour = RUNTIMES[runtime].with_(fused_attention=fused)
    book = ledger_of(workload, strategy, behaviour)
    laid = layout(workload, strategy, behaviour)
    left = book.moments[-1] - persistent(laid.setting, laid.lanes[0])
    rounding, gradient = COLUMN[MemoryKind.ROUNDING], COLUMN[MemoryKind.GRADIENT]
    assert left[gradient] == pytest.approx(workload.parameter_count * precision(recipe).parameter.size_bytes)
    assert left[rounding] >= 0
    for kind, column in COLUMN.items():
        if kind not in (MemoryKind.GRADIENT, MemoryKind.ROUNDING):
            assert left[column] == pytest.approx(0, abs=1e-6), kind
    assert book.moments.min() >= -1e-6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=some.sampled_from(["gpt", "llama", "mixture"]),
    expert=some.sampled_from([1, 2]),
    recipe=some.sampled_from(["fp32", "bf16-amp", "bf16"]),
    checkpoint=some.sampled_from(["none", "full", "every:2"]),
    schedule=some.sampled_from(["1f1b", "gpipe", "interleaved", "zb-h1", "zb-h2", "dualpipe", "breadth-first"]),
    tensor=some.sampled_from([1, 2]),
    sequence_parallel=some.booleans(),
    context=some.sampled_from([1, 2]),
    zero=some.sampled_from([0, 1, 2, 3]),
    runtime=some.sampled_from(["torch-eager", "megatron", "fsdp2", "deepspeed"]),
    stage=some.sampled_from([0, 1]),
)
def test_nothing_leaks_on_any_rank_of_a_pipeline(
    family, expert, recipe, checkpoint, schedule, tensor, sequence_parallel, context, zero, runtime, stage
):
    mixed = {"experts": 4, "top_k": 2, "expert_ffn": 32, "shared_ffn": 16} if family == "mixture" else {}
    workload = st.workload("llama" if mixed else family, seq_len=32, **(SIZES | {"layers": 8} | mixed))
    strategy = st.Strategy(
        data=2,
        pipeline=2,
        tensor=tensor,
        context=context,
        sequence_parallel=sequence_parallel and tensor > 1,
        schedule=schedule,
        micro_batch=2,
        accumulation=4,
        precision=recipe,
        checkpoint=checkpoint,
        zero=zero,
        optimizer="sgd",
        expert=expert if mixed and zero < 3 else 1,
    )
    book = ledger_of(workload, strategy, RUNTIMES[runtime], stage)
    laid = layout(workload, strategy, RUNTIMES[runtime])
    lane = laid.by_stage[stage][0]
    left = book.moments[-1] - persistent(laid.setting, lane)
    rounding, gradient = COLUMN[MemoryKind.ROUNDING], COLUMN[MemoryKind.GRADIENT]
    held = sum(p.elements for chunk in lane.chunks for p in chunk.parameters)
    kept = 0 if holds_gradients(laid.setting) else held * precision(recipe).parameter.size_bytes
    assert left[gradient] == pytest.approx(kept, abs=1e-6)
    assert left[rounding] >= -1e-6
    for kind, column in COLUMN.items():
        if kind not in (MemoryKind.GRADIENT, MemoryKind.ROUNDING):
            assert left[column] == pytest.approx(0, abs=1e-6), kind
    assert book.moments.min() >= -1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("fused", [True, False])
def test_saved_activations_of_a_block_against_korthikanti(dropout, fused):
    """Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h) bytes in 16 bit, with dropout.

    Without dropout its two hidden masks (2 s b h) and the mask and copy of the probabilities (3 a s^2 b) go. Fused attention keeps the
    log-sum-exp (4 bytes per head and token) instead of s x s scores. Norm statistics (16 bytes a token) are left out of their formula.
    """
    h, a, s, b = 128, 4, 64, 2
    workload = st.workload("gpt", layers=2, hidden=h, heads=a, vocabulary=256, seq_len=s, dropout=dropout)
    runtime = RUNTIMES["torch-eager"].with_(fused_attention=fused)
    block = concrete_layers(workload, precision("bf16"), runtime)[1]
    forward = {w.name: w for op in block.forward for w in op.writes}
    sizes = [forward[n].elements(b, s) * block.precision.dtype(forward[n].role).size_bytes for n in block.saved if n in forward]
    saved = sum(sizes) + 2 * s * b * h  # and the input of the block
    hidden = s * b * h * (34 if dropout else 32) + 16 * s * b
    attention = 4 * a * s * b if fused else (5 if dropout else 2) * a * s * s * b + s * s  # and the causal mask, shared by all heads
    assert saved == hidden + attention


def test_recomputation_stops_when_the_last_saved_tensor_exists():
    workload = st.workload("gpt", seq_len=32, **SIZES)
    block = concrete_layers(workload, precision("fp32"), RUNTIMES["torch-eager"])[1]
    names = [op.name for op in recomputed_operators(block, last_of_segment=True)]
    assert names == [op.name for op in block.forward][: len(names)]
    assert len(names) <= len(block.forward) - 2  # neither the second product of the MLP nor the residual sum


def peak(checkpoint: str, **options) -> dict[str, float]:
    workload = st.workload("gpt", layers=16, hidden=256, heads=4, vocabulary=256, seq_len=256)
    result = st.schedule(workload, "rtx-3090", st.Strategy(micro_batch=8, checkpoint=checkpoint, precision="bf16", **options))
    highest = result.memory.timeline.bytes_by_kind.max(axis=0)
    return {"total": result.memory.allocated_bytes, "recomputed": highest[COLUMN[MemoryKind.RECOMPUTED]]}


def test_checkpointing_trades_saved_for_recomputed():
    none, full, root = peak("none"), peak("full"), peak("sqrt")
    assert full["total"] < root["total"] < none["total"]
    assert none["recomputed"] == 0
    assert root["recomputed"] == pytest.approx(4 * full["recomputed"], rel=0.1)


def test_a_single_block_and_unequal_blocks_can_be_recomputed():
    one = st.workload("gpt", layers=1, hidden=256, heads=4, vocabulary=256, seq_len=256)
    assert st.schedule(one, "rtx-3090", "micro_batch=8,checkpoint=full").breakdown_s["recompute"] > 0
    blocks = [s for s in segments(st.workload("resnet50", recomputable=True), "every:4") if s.recomputed]
    assert [len(s.layers) for s in blocks] == [4, 4, 4, 4]


def test_sharded_states_shrink_with_the_replicas():
    workload = st.workload("gpt", seq_len=32, **SIZES)
    whole = st.schedule(workload, "4x rtx-3090", "data=4,zero=0").memory.by_kind_bytes
    sharded = st.schedule(workload, "4x rtx-3090", "data=4,zero=1").memory.by_kind_bytes
    assert sharded.get("optimizer", 0) == pytest.approx(whole["optimizer"] / 4, rel=1e-6)


def test_gpt2_states_are_sixteen_bytes_a_parameter():
    result = st.schedule("gpt2-small", "rtx-3090", "precision=fp32,micro_batch=4")
    kinds = result.memory.by_kind_bytes
    assert kinds["parameter"] + kinds["optimizer"] == pytest.approx(12 * 124_439_808, rel=1e-3)


def test_timeline_covers_the_step_and_peaks_where_it_says():
    result = st.schedule("gpt2-small", "4x rtx-3090", "data=4,precision=fp16-amp,accumulation=2,micro_batch=2")
    timeline = result.memory.timeline
    assert timeline.total_bytes.max() == pytest.approx(result.memory.allocated_bytes)
    assert timeline.moments[int(np.argmax(timeline.total_bytes))] == result.memory.peak_moment
    assert np.all(np.diff(timeline.time_s) >= 0)
    assert timeline.time_s[-1] <= result.step_time_s * (1 + 1e-9)
