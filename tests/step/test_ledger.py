"""Memory: nothing leaks over a step, published formulas hold, policies change what they should."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import StrategyError
from simtrain.core.precision import precision
from simtrain.core.result import MemoryKind
from simtrain.core.runtimes import RUNTIMES
from simtrain.step.layout import lay_out
from simtrain.step.occupancy import COLUMN
from simtrain.step.remat import segments
from simtrain.step.setting import resolve
from simtrain.step.specialize import concrete_layers, recomputed_operators
from simtrain.step.states import holds_gradients, optimizer_transients, persistent
from tests.step.books import layout, ledger_of

SIZES = {"layers": 5, "hidden": 64, "heads": 4, "vocabulary": 512}
families = some.sampled_from(["gpt", "llama", "bert"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=families,
    recipe=some.sampled_from(["fp32", "fp16-amp", "bf16"]),
    checkpoint=some.sampled_from(["none", "full", "sqrt", "every:2", "every:3", "selective", "selective-op"]),
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
    checkpoint=some.sampled_from(["none", "full", "every:2", "selective", "selective-op"]),
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
    whole = held * precision(recipe).parameter.size_bytes
    kept = 0 if holds_gradients(laid.setting) else whole / (2 * context if zero == 3 else 1)
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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["megatron", "torch-eager"])
def test_selective_recomputation_drops_the_scores_and_makes_them_again(dropout, name):
    """Korthikanti et al. 2022, equation 6 and section 5: 5 a s^2 b bytes less, one product of queries and keys more."""
    h, a, s, b = 128, 4, 64, 2
    workload = st.workload("gpt", layers=2, hidden=h, heads=a, vocabulary=256, seq_len=s, dropout=dropout)
    unfused = RUNTIMES[name].with_(fused_attention=False)
    strategy = st.Strategy(micro_batch=b, precision="bf16")
    kept, again = (layout(workload, strategy.with_(checkpoint=c), unfused).lanes[0].chunks[0].concrete[1] for c in ("none", "selective"))
    scores = (5 if dropout else 2) * a * s * s * b + (s * s if name == "torch-eager" else 0)  # and the causal mask
    sizes = [
        sum(c.tensors[n].elements(b, s) * c.dtype(n).size_bytes for n in c.saved if n in {w.name for op in c.forward for w in op.writes})
        for c in (kept, again)
    ]
    assert sizes[0] - sizes[1] == scores
    flops = [sum(op.flops(b, s) for op in c.backward) for c in (kept, again)]
    assert flops[1] - flops[0] == 2 * b * s * s * h
    fused = [layout(workload, strategy.with_(checkpoint=c), RUNTIMES[name]).lanes[0].chunks[0].concrete[1] for c in ("none", "selective")]
    assert fused[0].backward == fused[1].backward


CASES = {
    "te, unfused": ("gpt-12x512", False, "", 1, 4.35214),
    "te, fused": ("gpt-12x512", True, "", 1, 2.52548),
    "te, pipeline": ("gpt-12x512-nobias", False, "", 4, 2.50108),
    "te, uneven pipeline": ("gpt-12x512-untied", False, "2-4-4-2", 4, 2.22135),
    "te, interleaved": ("gpt-12x512", False, "", 4, 3.83627),
    "te, loss and embedding as layers": ("gpt-6x512-untied", False, "0-1-1-1-1-1-1-0", 4, 2.61785),
    "local": ("gpt-12x512", False, "", 4, 2.55795),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_rank_of_megatrons_functional_tests(case):
    """Peaks of bytes allocated on A100 that Megatron-LM's functional tests state, within 0.5 %."""
    model, fused, cuts, pipeline, gib = CASES[case]
    sizes = {"layers": 6 if "6x" in model else 12, "hidden": 512, "heads": 8, "vocabulary": 50304, "max_positions": 1024}
    options = {"dropout": 0.1, "tied_head": "untied" not in model, "bias": "nobias" not in model}
    chunks = {"te, interleaved": 3, "te, loss and embedding as layers": 2}.get(case, 1)
    strategy = st.Strategy(
        data=8 // pipeline,
        pipeline=pipeline,
        micro_batch=4,
        accumulation=8 * pipeline // 8,
        precision="bf16-master",
        zero=int(pipeline == 1),
        cuts=cuts,
        chunks=chunks if chunks > 1 else 0,
        schedule="interleaved" if chunks > 1 else "1f1b",
    )
    name = "megatron-local" if case == "local" else "megatron"
    runtime = RUNTIMES[name].with_(fused_attention=fused)
    result = st.estimate(st.workload("gpt", seq_len=1024, **sizes, **options), "dgx-a100-80gb", strategy, runtime=runtime)
    assert len(result.memory.allocated_by_class_bytes) == pipeline
    assert [*result.memory.allocated_by_class_bytes.values()][-1] == pytest.approx(gib * 2**30, rel=5e-3)


def test_workspaces_are_those_of_the_device():
    workload, strategy = st.workload("gpt", seq_len=32, **SIZES), st.Strategy(data=2, precision="bf16-master")
    held = []
    for device in ("a100-sxm-80g", "h100-sxm-80g"):
        laid = lay_out(resolve(workload, f"2x {device}", strategy, "megatron"))
        held.append(persistent(laid.setting, laid.lanes[0])[COLUMN[MemoryKind.WORKSPACE]] / 2**20)
    assert held == [68, 96]


def test_gradients_of_fp16_weights_stay_in_fp16_until_the_update():
    """2 + 2 + 4 + 8 bytes per parameter, and fp32 copies of the gradients in the update; bf16 ones add up in fp32."""
    workload = st.workload("gpt", seq_len=32, **SIZES)
    parameters = layout(workload, st.Strategy(precision="fp16-master"), RUNTIMES["megatron"]).lanes[0].chunks[0].parameters
    total = sum(p.elements for p in parameters)
    for recipe, whole, copies in (("fp16-master", 2, 4), ("bf16-master", 4, 0)):
        laid = layout(workload, st.Strategy(precision=recipe), RUNTIMES["megatron"])
        assert persistent(laid.setting, laid.lanes[0])[COLUMN[MemoryKind.GRADIENT]] == whole * total
        assert optimizer_transients(laid.setting, laid.lanes[0])[COLUMN[MemoryKind.GRADIENT]] == copies * total


def test_cuts_put_blocks_where_they_say():
    workload = st.workload("gpt", seq_len=32, **(SIZES | {"layers": 12}))
    laid = lay_out(resolve(workload, "4x a100-sxm-80g", "pipeline=4,cuts=2-4-4-2,accumulation=4"))
    assert [sum(x.block for x in lanes[0].chunks[0].workload) for lanes in laid.by_stage] == [2, 4, 4, 2]
    ends = lay_out(resolve(workload, "4x a100-sxm-80g", "pipeline=4,cuts=0-6-6-0,accumulation=4"))
    assert [[x.name for x in lanes[0].chunks[0].workload if not x.block] for lanes in ends.by_stage] == [["embedding"], [], [], ["head"]]
    for cuts, message in (("2-4-4-3", "13 blocks together, but gpt has 12"), ("3-3-3-1-1-1-0-0", "empty"), ("6-6", "does not divide")):
        with pytest.raises(StrategyError, match=message):
            resolve(workload, "4x a100-sxm-80g", f"pipeline=4,cuts={cuts}")
    with pytest.raises(StrategyError, match="names 8 chunks, but the 1f1b schedule over pipeline=4 has 4"):
        lay_out(resolve(workload, "4x a100-sxm-80g", "pipeline=4,cuts=1-2-1-2-1-2-1-2,accumulation=4"))


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
