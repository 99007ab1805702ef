"""Two real processes that really compute and send do what the fake rank does, byte for byte."""

import multiprocessing as mp
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel

from simtrain.torch.distributed import record_rank_step
from simtrain.torch.rank_recorder import RankRecorder
from simtrain.torch.wraps import fully_sharded, replicated, sharded_optimizer
from tests.torch.parallel_gpt import tensor_parallel
from tests.torch.test_ranks import BATCH, GPT, blocks, gpt, run
from workloads.transformer.module import example_batch

RANKS = 2
WAYS = {
    "ddp": lambda: replicated(bucket_cap_mb=0.1),
    "zero": replicated,
    "fsdp": lambda: fully_sharded(blocks),
    "tensor": lambda: tensor_parallel(sequence=False),
    "tensor with sequence": lambda: tensor_parallel(sequence=True),
}


def summary(recording: Any, collectives: Any) -> tuple[int, list[tuple[str, int, str, str]]]:
    """The peak without what gloo makes inside an operator, and what is sent."""
    used = {v.storage for call in recording.calls for v in call.inputs if "reduce_scatter" not in call.name}
    inside = [s for s, name in recording.given.items() if name.startswith("constant:") and s not in used]
    own = sum(recording.storage_bytes[s] for s in inside)
    return recording.peak_bytes - own, [(c.kind.value, c.size_bytes, c.phase.value, c.module) for c in collectives]


def real_rank(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = {}
    for how, way in WAYS.items():
        bare, batch = gpt(), example_batch(GPT, BATCH)
        module = way()(bare, init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tensor" if "tensor" in how else "data",)))
        optimizer = sharded_optimizer()(module) if how == "zero" else torch.optim.AdamW(module.parameters())
        recorder = RankRecorder(bare)
        with loss_parallel():
            recording = record_rank_step(module, lambda module=module, batch=batch: module(*batch), batch, optimizer, recorder)
        found[how] = summary(recording, recorder.collectives)
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def test_real_processes_do_the_same(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=real_rank, args=(rank, str(tmp_path / "store"), results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    real = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    for how in WAYS:
        for rank in range(RANKS):
            job = run(how, tensor=RANKS, rank=rank) if "tensor" in how else run(how, RANKS, rank=rank)
            assert summary(job.recording, job.collectives) == real[rank][how], (how, rank)
