"""Captured modules divided over tensor-parallel ranks, against the true rank that `parallelize_module` makes of the same module."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import simtrain as st
from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from simtrain.core.precision import precision
from simtrain.core.runtimes import runtime
from simtrain.core.workload import Form, Workload
from simtrain.step.specialize import concrete_layers
from simtrain.torch import record_rank
from tests.step.books import ledger_of
from workloads.transformer.module import Transformer, example_batch
from workloads.transformer.presets import spec as preset

BATCH = 4
SIZES = {"layers": 3, "hidden": 64, "heads": 8, "vocabulary": 96, "max_positions": 64, "sequence": 32}
GPT = preset("gpt", **SIZES, fused_qkv=True, tied_head=False)
PLAN = {"*.attention.qkv": "column", "*.attention.proj": "row", "*.mlp.fc1": "column", "*.mlp.fc2": "row", "*.wte": "vocabulary"}
EXACT = runtime("torch-eager").with_(allocator="exact", library="stated", optimizer_style="single", blas_handles=0)


@cache
def captured() -> Workload:
    return st.torch.capture(lambda: Transformer(GPT), example_batch(GPT, BATCH), tensor_plan=PLAN | {"head.linear": "gather"})


def parallel(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    ways = {"column": ColwiseParallel, "row": RowwiseParallel}
    for block in module.blocks:
        parallelize_module(block, mesh, {name.removeprefix("*."): ways[way]() for name, way in PLAN.items() if way in ways})
        block.attention.widths = [width // mesh.size() for width in block.attention.widths]
    ends = {
        "embedding.wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head.linear": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(module, mesh, ends)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_collectives_flops_and_memory_are_those_of_the_true_rank(ranks: int) -> None:
    job = record_rank(lambda: Transformer(GPT), example_batch(GPT, BATCH), mesh={"tensor": ranks}, wrap=parallel)
    assert captured().reform is not None
    mine = captured().reform(Form(tensor=ranks))
    recipe = precision("fp32")
    sent: dict[tuple[str, str], float] = {}
    for concrete, layer in zip(concrete_layers(mine, recipe, EXACT), mine.layers, strict=True):
        for phase, operators in (("forward", concrete.forward), ("backward", concrete.backward)):
            sizes = {t.name: t for op in (*concrete.forward, *concrete.backward) for t in op.writes}
            for op in operators:
                if op.collective is not None:
                    tensor = op.writes[0] if op.writes else sizes[op.updates[0]]
                    key = (op.collective.value.replace("-", "_"), phase)
                    sent[key] = sent.get(key, 0.0) + 4 * tensor.elements(BATCH, GPT.sequence) * layer.repeats
    for (kind, phase), volume in sent.items():
        assert volume == job.volume_bytes(kind, phase), (kind, phase)
    assert sum(sent.values()) == sum(c.size_bytes for c in job.collectives)
    assert mine.model_flops(BATCH) > 0
    book = ledger_of(captured(), st.Strategy(micro_batch=BATCH, tensor=ranks), EXACT)
    assert book.moments[0].sum() == pytest.approx(job.recording.given_bytes, rel=0.001)
    assert book.moments[book.peak].sum() == pytest.approx(job.peak_bytes, rel=0.005)


def test_a_division_multiplies_back_to_the_whole() -> None:
    whole = captured()
    assert whole.reform is not None
    mine = whole.reform(Form(tensor=4))

    def flops(work: Workload) -> float:
        return sum(op.flops(BATCH, 32) for layer in work for op in layer.forward + layer.backward)

    assert 4 * flops(mine) == pytest.approx(flops(whole))


def test_what_cannot_be_divided_is_refused_by_name() -> None:
    model, batch = (lambda: Transformer(GPT)), example_batch(GPT, BATCH)
    with pytest.raises(InputError, match="diagonal"):
        st.torch.capture(model, batch, tensor_plan={"*.fc1": "diagonal"})
    lonely = st.torch.capture(model, batch, tensor_plan={"*.mlp.fc1": "column"})
    with pytest.raises(UnsupportedError, match=r"blocks cannot be divided over 2 tensor-parallel ranks"):
        ledger_of(lonely, st.Strategy(micro_batch=BATCH, tensor=2), EXACT)
    with pytest.raises(StrategyError, match="tensor=5 does not divide"):
        ledger_of(captured(), st.Strategy(micro_batch=BATCH, tensor=5), EXACT)
    with pytest.raises(UnsupportedError, match="sequence parallelism"):
        ledger_of(captured(), st.Strategy(micro_batch=BATCH, tensor=2, sequence_parallel=True), EXACT)


@pytest.mark.parametrize("text", ["pipeline=3,accumulation=3", "data=4,zero=3", "data=2,tensor=2,zero=1"])
def test_captured_models_take_every_degree_that_is_known(text: str) -> None:
    strategy = st.Strategy.parse(f"micro_batch={BATCH},{text}")
    result = st.estimate(captured(), st.cluster(f"{strategy.ranks}x a100-sxm-80g"), strategy)
    assert result.step_time_s > 0


def test_equal_workloads_with_different_plans_are_divided_differently() -> None:
    model, batch = (lambda: Transformer(GPT)), example_batch(GPT, BATCH)
    one = captured()
    other = replace(
        st.torch.capture(model, batch, tensor_plan=dict.fromkeys(("*.mlp.fc1", "*.mlp.fc2"), "column")), description=one.description
    )
    assert one == other
    strategy = st.Strategy(micro_batch=BATCH, tensor=2)
    ledger_of(one, strategy, EXACT)
    with pytest.raises(UnsupportedError, match="cannot be divided"):
        ledger_of(other, strategy, EXACT)


def test_another_sequence_length_holds_for_a_rank_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from workloads.transformer.module import Transformer, example_batch\n"
        "from workloads.transformer.presets import spec\n"
        f"SPEC = spec('llama', **{SIZES})\n"
        "def make():\n    return Transformer(SPEC), example_batch(SPEC, 4)\n"
    )
    short, long = (st.workload(f"capture:{tmp_path / 'mine.py'}:make", seq_len=length) for length in (32, 64))
    halves = [w.reform(Form(tensor=1)) for w in (short, long) if w.reform is not None]
    assert [w.sequence for w in halves] == [32, 64]
