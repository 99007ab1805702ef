"""One true rank of a distributed job against closed forms of what it holds and what it sends."""

from functools import cache
from math import ceil

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.parallel import loss_parallel

from simtrain.core.errors import InputError
from simtrain.torch import RankRecording, record_rank, record_step
from simtrain.torch.wraps import fully_sharded, replicated, sharded_optimizer
from tests.torch.parallel_gpt import tensor_parallel
from workloads.transformer.module import Transformer, example_batch
from workloads.transformer.presets import spec

LAYERS, HIDDEN, VOCABULARY, POSITIONS, SEQUENCE, BATCH = 2, 64, 128, 64, 32, 4
GPT = spec("gpt", layers=LAYERS, hidden=HIDDEN, heads=8, vocabulary=VOCABULARY, max_positions=POSITIONS, sequence=SEQUENCE, fused_qkv=True)
STREAM = BATCH * SEQUENCE * HIDDEN * 4
"""Bytes of the residual stream of a rank in fp32."""
COUNTER = 4
"""AdamW counts the steps of every parameter."""
LOSS = 3 * BATCH * SEQUENCE * 4
"""Vocabulary-parallel cross-entropy reduces the maximum, the sum and the score of the target of every token."""


def gpt() -> Transformer:
    return Transformer(GPT)


def blocks(module: nn.Module) -> nn.ModuleList:
    return module.blocks


@cache
def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in gpt().named_parameters()}


def size_bytes(*, ranks: int = 1, where: str = "") -> int:
    """Parameters in fp32, the first dimension of each padded to a multiple of the ranks."""
    total = 0
    for name, (first, *others) in shapes().items():
        rest = 1
        for extent in others:
            rest *= extent
        total += ceil(first / ranks) * ranks * rest * 4 * (where in name)
    return total


BATCH_BYTES = 2 * BATCH * SEQUENCE * 8


@cache
def plain() -> tuple[int, int]:
    """Peak and persistent bytes of one rank alone."""
    with FakeTensorMode() as mode:
        batch = tuple(mode.from_tensor(t) for t in example_batch(GPT, BATCH))
        module = gpt()
        recording = record_step(module, lambda: module(*batch), batch, optimizer=torch.optim.AdamW(module.parameters()))
    return recording.peak_bytes, recording.given_bytes


@cache
def run(how: str, data: int = 1, tensor: int = 1, rank: int = 0) -> RankRecording:
    split = tensor_parallel(sequence="sequence" in how)
    shard = fully_sharded(blocks)
    batch = example_batch(GPT, BATCH)
    mesh = {"data": data} if data > 1 else {"tensor": tensor}
    if how == "ddp":
        return record_rank(gpt, batch, mesh=mesh, wrap=replicated(bucket_cap_mb=0.1), rank=rank)
    if how == "zero":
        return record_rank(gpt, batch, mesh=mesh, wrap=replicated(), optimizer=sharded_optimizer(), rank=rank)
    if how == "fsdp":
        return record_rank(gpt, batch, mesh=mesh, wrap=shard, rank=rank)
    if data > 1:
        mesh = {"data": data, "tensor": tensor}
        return record_rank(gpt, batch, mesh=mesh, wrap=lambda m, ranks: shard(split(m, ranks), ranks), around=loss_parallel, rank=rank)
    return record_rank(gpt, batch, mesh=mesh, wrap=split, around=loss_parallel, rank=rank)


@pytest.mark.parametrize("ranks", [2, 1024])
def test_ddp_reduces_every_gradient_once_and_holds_buckets(ranks: int) -> None:
    job = run("ddp", ranks)
    assert {c.kind for c in job.collectives} == {"all_reduce"}
    assert {c.phase for c in job.collectives} == {"backward"}
    assert len(job.collectives) > 2
    assert job.volume_bytes("all_reduce") == size_bytes()
    assert job.collectives[0].ranks == tuple(range(ranks))
    assert job.recording.given_bytes == 4 * size_bytes() + BATCH_BYTES + COUNTER * len(shapes())
    peak, given = plain()
    assert job.recording.given_bytes - given == job.peak_bytes - peak == size_bytes()


@pytest.mark.parametrize("ranks", [2, 8])
def test_zero_1_broadcasts_what_it_updates_and_shards_the_state(ranks: int) -> None:
    jobs = [run("zero", ranks, rank=rank) for rank in range(ranks)]
    for job in jobs:
        assert job.volume_bytes("all_reduce", "backward") == size_bytes()
        assert job.volume_bytes("broadcast", "optimizer") == size_bytes()
    states = [job.recording.given_bytes - 2 * size_bytes() - BATCH_BYTES for job in jobs]
    assert sum(states) == 2 * size_bytes() + COUNTER * len(shapes())
    assert max(states) < 1.5 * sum(states) / ranks  # whole parameters: uneven


@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_fsdp_gathers_twice_and_scatters_once(ranks: int) -> None:
    job = run("fsdp", ranks)
    whole, inside = size_bytes(ranks=ranks), size_bytes(ranks=ranks, where="blocks.")
    assert job.volume_bytes("all_gather", "forward") == whole
    assert job.volume_bytes("all_gather", "backward") == inside  # the root stays gathered
    assert job.volume_bytes("reduce_scatter") == job.volume_bytes("reduce_scatter", "backward") == whole
    assert {c.kind for c in job.collectives} == {"all_gather", "reduce_scatter"}
    gathers = [c for c in job.collectives if c.phase == "forward"]
    assert [c.module for c in gathers] == ["FSDPTransformer", *(f"blocks.{i}" for i in range(LAYERS))]
    counters = COUNTER * len(shapes())
    held = job.recording.given_bytes - whole // ranks - BATCH_BYTES - counters  # shards of parameters are padded, those of AdamW not
    assert 2 * size_bytes() // ranks <= held <= 2 * whole // ranks


def test_fsdp_frees_what_it_gathered() -> None:
    """What comes and goes in a step, shards aside, is at most what one rank alone has, its gradients and one gathered block more."""
    peak, given = plain()
    job = run("fsdp", 1024)
    own = job.peak_bytes - job.recording.given_bytes
    whole = size_bytes(ranks=1024)
    assert own < peak - given + 2 * whole
    assert job.recording.live_bytes[-1] < job.recording.given_bytes + 2 * whole // 1024 + STREAM


@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (8, 8)])
def test_tensor_parallelism_reduces_the_stream_four_times_a_block(ranks: int, count: int) -> None:
    job = run("tensor", tensor=ranks)
    assert {c.kind for c in job.collectives} == {"all_reduce"}
    assert job.volume_bytes("all_reduce", "forward") == (2 * LAYERS + 1) * STREAM + LOSS  # once more in the embedding
    assert job.volume_bytes("all_reduce", "backward") == (2 * LAYERS + 1) * STREAM  # and once more in the head
    assert job.volume_bytes("all_reduce", "optimizer") == 0
    modules = [c.module for c in job.collectives if c.phase == "forward" and "blocks" in c.module]
    assert modules == [f"blocks.{i}.{part}" for i in range(LAYERS) for part in ("attention", "mlp")]


@pytest.mark.parametrize("ranks", [2, 8])
def test_sequence_parallelism_sends_as_much_in_halves(ranks: int) -> None:
    job, whole = run("tensor with sequence", tensor=ranks), run("tensor", tensor=ranks)
    assert job.volume_bytes("all_gather", "forward") == (2 * LAYERS + 1) * STREAM
    assert job.volume_bytes("reduce_scatter", "forward") == 2 * LAYERS * STREAM
    assert job.volume_bytes("all_gather", "backward") == (2 * LAYERS + 1) * STREAM
    assert job.volume_bytes("reduce_scatter", "backward") == (2 * LAYERS + 1) * STREAM
    assert job.volume_bytes("all_reduce", "forward") == STREAM + LOSS
    assert job.volume_bytes("all_reduce", "backward") == 0
    assert job.peak_bytes < whole.peak_bytes
    norms = {c.size_bytes for c in job.collectives if c.phase == "optimizer"}
    assert norms == {HIDDEN * 4}  # gradients of norms are only summed when the optimizer reads them


@pytest.mark.parametrize("how", ["tensor", "tensor with sequence"])
@pytest.mark.parametrize("data", [4, 512])
def test_both_dimensions_at_once(how: str, data: int) -> None:
    job, alone = run(how, data=data, tensor=2), run(how, tensor=2)
    across = [c for c in job.collectives if len(c.ranks) == data]
    inside = [c for c in job.collectives if len(c.ranks) == 2]
    assert len(across) + len(inside) == len(job.collectives)
    assert across[0].ranks == tuple(range(0, 2 * data, 2))
    assert {c.ranks for c in inside} == {(0, 1)}
    streams = [c for c in inside if c.size_bytes >= STREAM]
    expected = [c for c in alone.collectives if c.size_bytes >= STREAM]
    assert [(c.kind, c.phase, c.size_bytes) for c in streams] == [(c.kind, c.phase, c.size_bytes) for c in expected]
    assert sum(c.size_bytes for c in across if c.phase == "forward") >= size_bytes() // 2


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_larger_job_is_no_more_work(how: str) -> None:
    small, large = (len(run(how, ranks).recording.calls) for ranks in (2, 1024))
    assert large <= 1.1 * small


def test_every_rank_of_a_group_does_the_same() -> None:
    first, last = (run("fsdp", 8, rank=rank) for rank in (0, 7))
    assert first.collectives == last.collectives
    assert first.peak_bytes == last.peak_bytes


def test_bad_jobs_are_refused() -> None:
    with pytest.raises(InputError, match="rank 2 is not one of a job of 2"):
        record_rank(gpt, example_batch(GPT, 1), mesh={"data": 2}, wrap=replicated(), rank=2)
    with pytest.raises(InputError, match="at least 1 rank"):
        record_rank(gpt, example_batch(GPT, 1), mesh={"data": 0}, wrap=replicated())
