"""Moves what blocks of a real model save for backward to host memory and back, with PyTorch's hooks on saved tensors.

While a block runs forward, everything it saves but parameters is copied to the host: whole storages, each once, since a device lets memory
go by storages, whatever part of them is saved. The device lets it go when the next
block that moves has run forward, and fetching begins with the backward pass of that next block: the rule that predictions follow
(`simtrain.step.offload_activations`). On CUDA, copies run on streams of their own through pinned memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from simtrain.core.errors import InternalError, StrategyError
from simtrain.core.strategy import Strategy

Place = tuple[int, int]
"""Storage and version of a tensor: what makes two saved tensors the same bytes."""


def offloaded_blocks(strategy: Strategy, blocks: Sequence[str]) -> list[str]:
    """Names of the blocks whose activations a strategy moves: those it names, or all but the last.

    Raises:
        StrategyError: It names a block that the model lacks.
    """
    named = strategy.moved.blocks
    if named is None:
        return list(blocks[:-1])
    if max(named) >= len(blocks):
        raise StrategyError(f"offload={strategy.offload}: the model has blocks 0 to {len(blocks) - 1}, no block {max(named)}")
    return [blocks[i] for i in sorted(named)]


class _Moved:
    """A storage on the host, which a group brings back."""

    def __init__(self, group: _Group, host: Tensor, device: torch.device) -> None:
        self.group, self.host, self.device = group, host, device
        self.back: Tensor | None = None


class _View:
    """A saved tensor as a view of a storage that has moved."""

    def __init__(self, moved: _Moved, saved: Tensor) -> None:
        self.moved, self.dtype = moved, saved.dtype
        self.place = (saved.storage_offset(), saved.size(), saved.stride())

    def of(self, storage: Tensor) -> Tensor:
        """The same view of the storage that came back."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage.untyped_storage(), *self.place)


class _Group:
    """What one run of a block saves."""

    def __init__(self, before: _Group | None) -> None:
        self.before = before
        self.sources: dict[Place, tuple[Tensor, _Moved]] = {}
        self.moved: list[weakref.ref[_Moved]] = []  # which only the graph keeps alive
        self.left: torch.cuda.Event | None = None
        self.ready: torch.cuda.Event | None = None
        self.fetched = False


class ActivationOffload:
    """Watches blocks and moves what they save.

    Args:
        model: What is trained.
        names: Module paths of the blocks that move, in the order in which they run.
        recomputed: Those among them that are recomputed, whose saved tensors are those of the recomputation and stay.

    Attributes:
        names: Blocks that move.
        moved_bytes: What the last forward pass of each has moved, by module path.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, recomputed: Sequence[str] = ()) -> None:
        modules = dict(model.named_modules())
        self.names = tuple(name for name in names if name not in recomputed)
        self.moved_bytes: dict[str, int] = {}
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._name = {modules[name]: name for name in self.names}
        self._open: list[tuple[_Group, AbstractContextManager[Any]]] = []
        self._latest: _Group | None = None
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        for block in self._name:
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, always_call=True)
        model.register_forward_hook(self._end, always_call=True)

    def _enter(self, block: nn.Module, args: Any) -> None:  # noqa: ARG002
        if not torch.is_grad_enabled():
            return
        group = _Group(self._latest)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: self._away(group, saved), self._back)
        hooks.__enter__()
        self._open.append((group, hooks))

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if not self._open or not torch.is_grad_enabled():
            return
        group, hooks = self._open.pop()
        hooks.__exit__(None, None, None)
        self.moved_bytes[self._name[block]] = sum(moved.host.numel() for _, moved in group.sources.values())
        if self._latest is not None:
            self._let_go(self._latest)
        self._latest = group

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        """Ends a forward pass: what was sent last goes too."""
        if self._latest is not None:
            self._let_go(self._latest)
        self._latest = None

    def _let_go(self, group: _Group) -> None:
        """Frees what a group has copied; the computation waits until the copy is done."""
        if group.left is not None:
            torch.cuda.current_stream().wait_event(group.left)
        group.sources.clear()

    def _away(self, group: _Group, saved: Tensor) -> Tensor | _View:
        if saved.untyped_storage()._cdata in self._parameters or not saved.numel():
            return saved
        place = (saved.untyped_storage()._cdata, saved._version)
        if place not in group.sources:
            cuda = saved.device.type == "cuda"
            source = torch.empty(0, dtype=torch.uint8, device=saved.device).set_(saved.untyped_storage())
            host = torch.empty_like(source, device="cpu", pin_memory=cuda)
            with self._stream(saved.device, out=True):
                host.copy_(source, non_blocking=cuda)
                if cuda:
                    group.left = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    group.left.record()
            moved = _Moved(group, host, saved.device)
            group.sources[place] = (source, moved)
            group.moved.append(weakref.ref(moved))
        return _View(group.sources[place][1], saved)

    def _back(self, packed: Tensor | _View) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        moved = packed.moved
        group = moved.group
        self._fetch(group)
        if group.ready is not None:
            torch.cuda.current_stream().wait_event(group.ready)
        if group.before is not None:
            self._fetch(group.before)
            group.before = None
        if moved.back is None:
            raise InternalError("a saved tensor did not come back from the host with those of its block")
        return packed.of(moved.back)

    def _fetch(self, group: _Group) -> None:
        """Begins to bring a group back."""
        if group.fetched:
            return
        group.fetched = True
        for reference in group.moved:
            moved = reference()
            if moved is None:
                continue
            cuda = moved.device.type == "cuda"
            moved.back = torch.empty_like(moved.host, device=moved.device)
            with self._stream(moved.device, out=False):
                moved.back.copy_(moved.host, non_blocking=cuda)
                if cuda:
                    moved.back.record_stream(torch.cuda.current_stream())
                    group.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    group.ready.record()

    def _stream(self, device: torch.device, *, out: bool) -> AbstractContextManager[Any]:
        """The stream of a direction, which goes on from what is computed so far."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            out_, in_ = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
            self._streams[device] = (out_, in_)
        stream = self._streams[device][0 if out else 1]
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)


__all__ = ["ActivationOffload", "offloaded_blocks"]
