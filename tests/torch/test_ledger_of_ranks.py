"""The memory ledger against true ranks of PyTorch: replicated, fully sharded and tensor-parallel training of one GPT."""

import pytest
from torch.distributed.tensor.parallel import loss_parallel

import simtrain as st
from simtrain.core.runtimes import RUNTIMES
from simtrain.step.ledger import ledger
from simtrain.torch import RankRecording, record_rank
from simtrain.torch.wraps import fully_sharded, replicated
from tests.step.books import layout
from tests.torch.parallel_gpt import tensor_parallel
from workloads.transformer.module import Transformer, example_batch
from workloads.transformer.presets import spec

SIZES = {"layers": 3, "hidden": 256, "heads": 8, "vocabulary": 4096, "max_positions": 128}
GPT = spec("gpt", sequence=128, **SIZES)
BATCH = 4


def recorded(how: str, ranks: int) -> RankRecording:
    batch = example_batch(GPT, BATCH)
    if how == "replicated":
        return record_rank(lambda: Transformer(GPT), batch, mesh={"data": ranks}, wrap=replicated())
    if how == "sharded":
        return record_rank(lambda: Transformer(GPT), batch, mesh={"data": ranks}, wrap=fully_sharded(lambda m: m.blocks))
    wrap = tensor_parallel(sequence=how == "sequence")
    return record_rank(lambda: Transformer(GPT), batch, mesh={"tensor": ranks}, wrap=wrap, around=loss_parallel)


@pytest.mark.parametrize(
    ("how", "ranks"), [("replicated", 8), ("sharded", 2), ("sharded", 8), ("tensor", 2), ("tensor", 4), ("sequence", 2), ("sequence", 4)]
)
def test_peaks_are_those_of_true_ranks(how, ranks):
    choice = {
        "replicated": {"data": ranks},
        "sharded": {"data": ranks, "zero": 3},
        "tensor": {"tensor": ranks},
        "sequence": {"tensor": ranks, "sequence_parallel": True},
    }[how]
    laid = layout(st.workload("gpt", seq_len=128, **SIZES), st.Strategy(micro_batch=BATCH, **choice), RUNTIMES["torch-eager-cpu"])
    book = ledger(laid.setting, laid.lanes[0], laid.plan)
    rank = recorded(how, ranks)
    assert book.moments[0].sum() == pytest.approx(rank.recording.given_bytes, rel=1e-3)
    assert book.peak_bytes == pytest.approx(rank.peak_bytes, rel=5e-3)
