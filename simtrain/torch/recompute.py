"""Recomputes chosen blocks of a real model, without changing its structure: parameters keep their names and users keep their loop.

Hooks before and after blocks open and close PyTorch's own non-reentrant checkpoint around them. A segment of several blocks is
recomputed by calling them one after the other again, so nothing else may run between them; that is checked while they run. Before a
block runs under a checkpoint for the first time, it is run twice on a copy of its input: a block that does not do the same twice, or
changes its input or its buffers, is kept and named.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator

from simtrain.core.errors import InputError, UnsupportedError

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Recomputation:
    """Watches a model's blocks and puts checkpoints around some of them.

    Args:
        model: What is trained.
        names: Module paths of all blocks, in the order in which they run.
        segments: Half-open ranges of `names` that are recomputed together.
        batch_norms: Recompute blocks with batch norms too, whose running statistics are then updated twice a step.

    Attributes:
        recomputed: Names of the blocks that are recomputed.
        kept: Blocks that were to be recomputed and are not, with the reason.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], segments: Sequence[tuple[int, int]], *, batch_norms: bool = False) -> None:
        modules = dict(model.named_modules())
        self._names = {modules[name]: name for name in names}
        self._blocks = [modules[name] for name in names]
        self._segment: dict[nn.Module, int] = {}
        self._last: set[nn.Module] = set()
        self._tested: set[nn.Module] = set()
        self._batch_norms = batch_norms
        self.kept: dict[str, str] = {}
        for number, (start, stop) in enumerate(segments):
            for block in self._blocks[start:stop]:
                if (reason := _unsafe(block)) and not batch_norms:
                    self.kept[self._names[block]] = reason
                else:
                    self._segment[block] = number
            self._last.add(self._blocks[stop - 1])
        self._open: Generator[None, None, None] | None = None
        self._calls: list[_Call] = []
        self._output: Any = None
        self._version = 0
        self._quiet = False
        for block in self._blocks if self._segment else ():
            block.register_forward_pre_hook(self._before, with_kwargs=True)
            block.register_forward_hook(self._after, prepend=True, always_call=True)
        if self._segment:
            model.register_forward_hook(self._end, always_call=True)

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Names of the blocks that are recomputed."""
        return tuple(self._names[block] for block in self._blocks if block in self._segment)

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._quiet or not torch.is_grad_enabled():
            return
        self._test(block, args, kwargs)
        number = self._segment.get(block)
        if self._open is not None:
            if number is not None and number == self._segment.get(self._calls[-1][0]):
                if not args or not self._follows(args[0]):
                    self._close()
                    raise InputError(
                        f"between {self._names[self._calls[-1][0]]} and {self._names[block]} something else runs, so they cannot be "
                        "recomputed together: recompute each on its own, as checkpoint=full or layers:0-3 do"
                    )
                self._calls.append((block, args[1:], kwargs))
                return
            self._close()
        if number is not None:
            self._calls = calls = [(block, args[1:], kwargs)]
            self._open = _checkpoint_without_reentrant_generator(_again(calls), True, self._contexts, "default", False, True, *args[:1])
            next(self._open)

    def _after(self, block: nn.Module, _args: Any, output: Any) -> None:
        if self._quiet or self._open is None:
            return
        self._output, self._version = output, getattr(output, "_version", 0)
        if block in self._last or output is None:
            self._close()

    def _follows(self, x: Any) -> bool:
        """Whether a block's input is the output of the block before, as it was (full sharding hands on a view of it)."""
        before = self._output
        if not isinstance(x, Tensor) or not isinstance(before, Tensor):
            return x is before
        where = [(t.data_ptr(), t.shape, t.stride()) for t in (x, before)]
        return where[0] == where[1] and x._version == self._version

    def _end(self, *_: Any) -> None:
        if self._open is not None and not self._quiet:
            self._close()

    def _close(self) -> None:
        running, self._open, self._output = self._open, None, None
        if running is not None:
            next(running, None)

    def _contexts(self) -> tuple[Any, Any]:
        return _nothing(), self._quietly()

    @contextmanager
    def _quietly(self) -> Generator[None, None, None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _test(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds out, once, whether a block may run twice."""
        if block in self._tested or block not in self._segment:
            return
        self._tested.add(block)
        with self._quietly():
            reason = _differs(block, args, kwargs, batch_norms=self._batch_norms)
        if reason:
            del self._segment[block]
            self.kept[self._names[block]] = reason
            warnings.warn(f"{self._names[block]} is not recomputed: {reason}", stacklevel=2)


def _again(calls: list[_Call]) -> Callable[..., Any]:
    """Runs the blocks of a segment one after the other; there may be more of them by then than now."""

    def run(*first: Any) -> Any:
        x: Any = first
        for block, rest, kwargs in calls:
            x = (block(*x, *rest, **kwargs),)
        return x[0]

    return run


@contextmanager
def _nothing() -> Generator[None, None, None]:
    yield


def _unsafe(block: nn.Module) -> str:
    """Why a block must not run twice, as far as its modules tell."""
    for module in block.modules():
        if isinstance(module, _BATCH_NORM) and module.track_running_stats:
            return "its batch norms would update their running statistics twice"
    return ""


def _differs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, batch_norms: bool) -> str:
    """Runs a block twice from the same state of random numbers; says what was not the same, or changed."""
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    excused = {id(b) for m in block.modules() if isinstance(m, _BATCH_NORM) for b in m.buffers()} if batch_norms else set()
    device = next((t.device for t in tree_leaves(args) if isinstance(t, Tensor)), torch.device("cpu"))
    cuda = [device] if device.type == "cuda" else []
    outputs = []
    try:
        for _ in range(2):
            # neither gradients nor random numbers of the real step may notice
            with torch.no_grad(), torch.random.fork_rng(devices=cuda):
                given, named = _copied(args), _copied(kwargs)
                versions = [t._version for t in tree_leaves((given, named)) if isinstance(t, Tensor)]
                # without the block's own hooks: those of full sharding have gathered its parameters, and would let them go
                outputs.append([t for t in tree_leaves(block.forward(*given, **named)) if isinstance(t, Tensor)])
                if versions != [t._version for t in tree_leaves((given, named)) if isinstance(t, Tensor)]:
                    return "it changes its input in place"
        if any(id(buffer) not in excused and not torch.equal(buffer, buffers[name]) for name, buffer in block.named_buffers()):
            return "it changes its buffers"
    finally:
        with torch.no_grad():
            for name, buffer in block.named_buffers():
                buffer.copy_(buffers[name])
    if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*outputs, strict=True)):
        return "it does not do the same twice (random numbers that are not PyTorch's, or state of its own)"
    return ""


def _copied(values: Any) -> Any:
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)


def block_segments(checkpoint_length: int, count: int) -> tuple[tuple[int, int], ...]:
    """Segments of so many blocks each, the last one shorter; none for a length of 0."""
    if not checkpoint_length:
        return ()
    return tuple((start, min(start + checkpoint_length, count)) for start in range(0, count, checkpoint_length))


def check_names(model: nn.Module, names: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """Refuses blocks that the model lacks.

    Raises:
        InputError: With what it has.
    """
    for name in names:
        if name not in modules:
            raise InputError(f"{type(model).__name__} has no module {name!r}: name blocks as model.named_modules() does")
    for name in names:
        if any(other != name and other.startswith(f"{name}.") for other in names):
            raise UnsupportedError(f"block {name} contains another block: name the outermost ones, or the innermost, not both")


__all__ = ["Recomputation", "block_segments", "check_names"]
