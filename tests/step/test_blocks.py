"""The allocator's replay asks for what the ledger counts, and comes out where published runs do."""

import pytest

import simtrain as st
from simtrain.core.runtimes import RUNTIMES
from simtrain.step.blocks import block_peaks
from simtrain.step.layout import lay_out
from simtrain.step.ledger import ledger
from simtrain.step.setting import resolve
from validation.layouts import load_layouts
from validation.report import predict_layout

SIZES = {"layers": 6, "hidden": 256, "heads": 4, "vocabulary": 2048}
CASES = {
    "plain": ("gpt", "1x a100", "micro_batch=4,accumulation=3", "torch-eager"),
    "autocast": ("gpt", "1x a100", "micro_batch=4,precision=bf16-amp,accumulation=2", "torch-eager"),
    "compiled": ("gpt", "1x a100", "micro_batch=4,precision=bf16-amp", "torch-compiled"),
    "full": ("llama", "1x a100", "micro_batch=4,precision=bf16-amp,checkpoint=full", "torch-eager"),
    "every other": ("gpt", "1x a100", "micro_batch=4,precision=fp16-amp,checkpoint=every:2", "torch-eager"),
    "inside blocks": ("llama", "1x a100", "micro_batch=4,checkpoint=selective-op,precision=bf16", "torch-eager"),
    "replicas": ("bert", "4x a100", "data=4,micro_batch=2", "torch-eager"),
    "fully sharded": ("llama", "4x a100", "data=4,zero=3,micro_batch=2,precision=bf16-master", "fsdp2"),
    "sharded, recomputed": ("llama", "4x a100", "data=4,zero=3,micro_batch=2,precision=bf16-master,checkpoint=full", "fsdp2"),
    "pipeline": ("gpt", "4x a100", "pipeline=2,tensor=2,micro_batch=1,accumulation=4,precision=bf16-master", "megatron"),
    "interleaved": ("gpt", "2x a100", "pipeline=2,chunks=3,schedule=interleaved,micro_batch=1,accumulation=4", "megatron"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_replay_asks_for_what_the_ledger_counts(name):
    family, devices, strategy, runtime = CASES[name]
    setting = resolve(st.workload(family, seq_len=128, **SIZES), devices, strategy, RUNTIMES[runtime].with_(replays_blocks=True))
    layout = lay_out(setting)
    for lane in layout.lanes:
        peaks = block_peaks(setting, lane, layout.plan)
        assert peaks is not None
        assert peaks.asked_bytes == pytest.approx(ledger(setting, lane, layout.plan).peak_bytes, rel=1e-4)
        assert peaks.asked_bytes <= peaks.allocated_bytes * (1 + 1e-6) <= peaks.reserved_bytes * (1 + 2e-6)


def test_other_allocators_and_orders_are_not_replayed():
    work = st.workload("gpt", seq_len=64, **SIZES)
    for devices, strategy, runtime in (
        ("dgx-2", "data=16,zero=3,offload=optimizer", "fsdp2"),
        ("2x a100", "data=2,zero=1,precision=fp16-master", "deepspeed"),
        ("1x tpu-v4", "precision=bf16", "xla"),
        ("1x a100", "micro_batch=1", "torch-eager"),
    ):
        setting = resolve(work, devices, strategy, runtime)
        layout = lay_out(setting)
        assert block_peaks(setting, layout.lanes[0], layout.plan) is None
        assert st.estimate(work, devices, strategy, runtime=runtime).memory.blocks_bytes == 0


def test_readers_agree_on_what_is_reserved():
    work = st.workload("gpt", seq_len=128, **SIZES)
    found = [
        reader(work, "1x a100", "micro_batch=4", runtime="torch-compiled").memory for reader in (st.estimate, st.schedule, st.simulate)
    ]
    assert len({m.reserved_bytes for m in found}) == 1
    assert found[0].allocated_bytes <= found[0].blocks_bytes <= found[0].reserved_bytes <= found[0].device_bytes


def test_logits_that_a_compiled_model_returns_cost_zeros_of_their_size():
    work = st.workload("gpt2-small", seq_len=1024)
    runtime = RUNTIMES["torch-compiled"]
    peaks = [
        st.estimate(work, "1x a100", "micro_batch=8,precision=bf16-amp", runtime=runtime.with_(returns_logits=returned)).memory
        for returned in (True, False)
    ]
    assert peaks[0].allocated_bytes - peaks[1].allocated_bytes == pytest.approx(8 * 1024 * 50257 * 2, rel=1e-3)


@pytest.mark.parametrize(
    ("source", "where", "within"),
    [
        ("megatron_reference", "gpt/gpt3_mcore_tp4_pp1/lts_dgx_a100 (local layers)", 0.005),
        ("rented_gpt2", "06-gpt-cuda: 1 x a40", 0.012),
        ("rented_gpt2", "06-gpt-cuda: 1 x b200", 0.012),
    ],
)
def test_published_peaks(source, where, within):
    """Rows of 3 MiB tensors in holes of 4 MiB, and of logits that a compiled model returns."""
    dataset = load_layouts(source)
    rows = [r for r in dataset.rows if r.where == where]
    assert rows
    for row in rows:
        assert predict_layout(dataset, row).memory_bytes == pytest.approx(dataset.memory_bytes(row), rel=within)
