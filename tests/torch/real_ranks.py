"""One of two processes that really compute and send: `python -m tests.torch.real_ranks RANK STORE OUTPUT`."""

import json
import sys
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
from tests.torch.test_ranks import BATCH, GPT, blocks, gpt
from workloads.transformer.module import example_batch

RANKS = 2
REPEATS = 2
WAYS = {
    "ddp": lambda: replicated(bucket_cap_mb=0.1),
    "zero": replicated,
    "fsdp": lambda: fully_sharded(blocks),
    "tensor": lambda: tensor_parallel(sequence=False),
    "tensor with sequence": lambda: tensor_parallel(sequence=True),
}


def summary(recording: Any, collectives: Any) -> list[Any]:
    """The peak without what gloo, which has no reduce-scatter, makes inside that operator (in the middle of backward); what is sent."""
    gone = {storage for _, storage in recording.releases}
    inside = [s for s, name in recording.given.items() if name.startswith("constant:") and s in gone]
    own = sum(recording.storage_bytes[s] for s in inside)
    return [recording.peak_bytes - own, [[c.kind.value, c.size_bytes, c.phase.value, c.module] for c in collectives]]


def record(how: str) -> list[Any]:
    """Records a real step of this process."""
    bare, batch = gpt(), example_batch(GPT, BATCH)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tensor" if "tensor" in how else "data",))
    module = WAYS[how]()(bare, mesh)
    optimizer = sharded_optimizer()(module) if how == "zero" else torch.optim.AdamW(module.parameters())
    recorder = RankRecorder(bare)
    with loss_parallel():
        recording = record_rank_step(module, lambda: module(*batch), batch, optimizer, recorder)
    return summary(recording, recorder.collectives)


def main(rank: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    # Gloo's thread may hold what it sends a moment longer, on a busy machine beyond the peak: the least of some steps has nothing of that.
    found = {how: min((record(how) for _ in range(REPEATS)), key=lambda one: one[0]) for how in WAYS}
    Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
