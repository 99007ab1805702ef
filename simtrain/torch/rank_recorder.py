"""Records what one rank of a distributed job runs on its own shards, and the collectives that it issues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from simtrain.core.errors import InternalError
from simtrain.torch.recorder import Recorder
from simtrain.torch.recording import Phase


class CollectiveKind(StrEnum):
    """What a group of ranks does together."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    SEND = "send"
    RECEIVE = "receive"


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective that a rank issued.

    Attributes:
        kind: What is done.
        ranks: Global numbers of those who take part.
        size_bytes: Of the whole: what everyone reduces or receives; after gathering; before scattering. Padding is part of it.
        dtype: Number format.
        module: Path of the module that was running, in backward that whose forward pass is being undone; "" where PyTorch does not say.
        phase: Part of the step.
        position: Of its operator in `Recording.calls`.
    """

    kind: CollectiveKind
    ranks: tuple[int, ...]
    size_bytes: int
    dtype: str
    module: str
    phase: Phase
    position: int


class RankRecorder(Recorder):  # type: ignore[no-untyped-call]
    """Records what a rank runs on its own shards, and its collectives.

    Attributes:
        root: The module before it was wrapped.
        collectives: Those issued so far.
    """

    def __init__(self, root: nn.Module) -> None:
        self.collectives: list[Collective] = []
        self._groups: dict[str, tuple[int, ...]] = {}
        self._node_paths: dict[int, str] = {}
        self._seen = 0
        self.root = root
        super().__init__(root)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor | AsyncCollectiveTensor) for t in types):
            return NotImplemented  # they come again as operators on this rank's tensors
        if func.namespace in _NAMESPACES and func._opname == "wait_tensor":
            if not isinstance(args[0], FakeTensor):
                func(*args, **(kwargs or {}))  # who never waits keeps what arrived for good
            return args[0]  # as it does for real; on tensors without values PyTorch hands out a new one
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace in _NAMESPACES and func._opname not in _NO_TRANSFER:
            self._collective(func, (*args, *(kwargs or {}).values(), out))
        return out

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Notes storages that are emptied and filled again, as FSDP2 does with gathered parameters."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            number, new = self._number_storage(storage)
            if new:
                self._given[number] = f"constant:{number}"
            result = original(storage, size)
            self._resizes.append((len(self.calls), number, size))
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def _number(self, tensor: Tensor) -> tuple[int, bool]:
        return super()._number(local_tensor(tensor))

    def _collective(self, func: Any, values: Sequence[Any]) -> None:
        kind = _kind(func)
        tensors = [[t for t in tree_leaves(value) if isinstance(t, Tensor)] for value in values]
        largest = max(tensors, key=lambda group: sum(t.nbytes for t in group))
        call = self.calls[-1]
        path = call.module or self._paths_of_nodes().get(call.node, "")
        sizes = sum(t.nbytes for t in largest)
        dtype = str(largest[0].dtype).removeprefix("torch.")
        self.collectives.append(Collective(kind, self._ranks(values), sizes, dtype, path, self.phase, len(self.calls) - 1))

    def _paths_of_nodes(self) -> dict[int, str]:
        """Module path by number of the autograd node that a forward operator made."""
        for call in self.calls[self._seen :]:
            if call.phase is Phase.FORWARD:
                self._node_paths.setdefault(call.counter - 1, call.module)
        self._seen = len(self.calls)
        return self._node_paths

    def _ranks(self, values: Sequence[Any]) -> tuple[int, ...]:
        name = next((v for v in values if isinstance(v, str) and v not in _REDUCTIONS), "")
        if not name:
            boxed = next(v for v in values if isinstance(v, torch.ScriptObject) and "ProcessGroup" in str(v._type()))
            name = dist.ProcessGroup.unbox(boxed).group_name
        if name not in self._groups:
            group = _resolve_process_group(name)  # type: ignore[arg-type]
            self._groups[name] = tuple(dist.get_process_group_ranks(group))
        return self._groups[name]


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a distributed tensor; any other tensor itself."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    return tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor


_NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
_NO_TRANSFER = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_", "check_for_nan")
_REDUCTIONS = ("sum", "avg", "max", "min", "product", "premulsum")
_NAMES = {
    "allreduce": CollectiveKind.ALL_REDUCE,
    "allgather": CollectiveKind.ALL_GATHER,
    "reducescatter": CollectiveKind.REDUCE_SCATTER,
    "alltoall": CollectiveKind.ALL_TO_ALL,
    "sharddimalltoall": CollectiveKind.ALL_TO_ALL,
    "broadcast": CollectiveKind.BROADCAST,
    "send": CollectiveKind.SEND,
    "isend": CollectiveKind.SEND,
    "recv": CollectiveKind.RECEIVE,
    "irecv": CollectiveKind.RECEIVE,
}


def _kind(func: Any) -> CollectiveKind:
    """PyTorch has several operators for each: `allreduce_`, `all_reduce`, `allreduce_coalesced_`, ..."""
    name = func._opname.replace("_", "")
    for start, kind in _NAMES.items():
        if name.startswith(start):
            return kind
    raise InternalError(f"a rank issued a collective that has no kind here: {func}")


__all__ = ["Collective", "CollectiveKind", "RankRecorder", "local_tensor"]
