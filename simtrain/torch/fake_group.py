"""A process group without processes: one rank of a job of any size runs here, and its collectives return at once, undone.

Two things in PyTorch look at values, which tensors under `FakeTensorMode` do not have. Each is run on real tensors instead.

| where | what it computes |
|---|---|
| `DeviceMesh` | where this rank stands in a mesh made from others (`nonzero`): FSDP2 on top of tensor parallelism does that |
| `Reducer._rebuild_buckets` of DDP | the order of parameters that rank 0 broadcasts after the first step |

DDP waits for the result of its all-reduce, which the fake group's handle lacks: a communication hook does the same and returns it. And
FSDP2 makes the shards of all ranks to keep one, which is the only work that grows with the job: here it makes the one it takes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from simtrain.core.errors import InputError


@contextmanager
def fake_group(world_size: int, rank: int) -> Iterator[None]:
    """Makes this process rank `rank` of a job of `world_size` ranks, of which the others do not exist.

    Raises:
        InputError: There is a process group already, or no such rank.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} is not one of a job of {world_size} (0 to {world_size - 1})")
    if dist.is_initialized():
        raise InputError("this process belongs to a process group already: torch.distributed.destroy_process_group() first")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            _replaced(DeviceMesh, "_compute_coordinate_on_dim", _coordinates),
            _replaced(ShardingPropagator, "_fake_mode_lock", _Apart()),
            _replaced(_fsdp_param, "_chunk_with_empty", _Shards),
        ):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


_original_coordinates = DeviceMesh._compute_coordinate_on_dim


def _coordinates(mesh: DeviceMesh) -> tuple[int, ...] | None:
    with unset_fake_temporarily():
        return _original_coordinates(mesh)


class _Apart:
    """DTensor finds global shapes by running operators on fake tensors of its own; no mode outside may see them."""

    def __init__(self) -> None:
        self.entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        self.entered.append(_disable_current_modes())
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


@dataclass(frozen=True, slots=True)
class _Shards:
    """The parts of a tensor along a dimension, as `torch.chunk` cuts it, with empty ones at the end."""

    tensor: Tensor
    count: int
    dim: int

    def __getitem__(self, index: int) -> Tensor:
        extent = self.tensor.size(self.dim)
        rows = -(-extent // self.count)
        start = index * rows
        return self.tensor.narrow(self.dim, start, min(rows, extent - start)) if start < extent else self.tensor.new_empty(0)


def average_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Divides a bucket of gradients and all-reduces it in place, as DDP does without a hook.

    DDP checks the annotations of hooks, so this file evaluates annotations.
    """
    buffer = bucket.buffer()
    buffer.div_(group.size())
    dist.all_reduce(buffer, group=group)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future


def rebuild_buckets(module: nn.Module) -> None:
    """Lets DDP rebuild its buckets in the order of the gradients of the first step; any other module is left alone."""
    if isinstance(module, DistributedDataParallel):
        with _RealNumbers():  # type: ignore[no-untyped-call]
            module.reducer._rebuild_buckets()


class _RealNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes tables of whole numbers real, and keeps what is computed from real tensors alone real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        table = func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") is torch.int32
        if table or (tensors and not any(isinstance(t, FakeTensor) for t in tensors)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)
