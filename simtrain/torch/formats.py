"""Number formats of a real model, block by block: autocast regions around them, and the magnitudes of gradients that reach them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from simtrain.core.precision import DType, Precision
from simtrain.step.rounding import Exponents
from simtrain.torch.pieces import block_paths

DTYPES = {DType.FP16: torch.float16, DType.BF16: torch.bfloat16}


def region(recipe: Precision, device: str) -> AbstractContextManager[Any]:
    """The autocast region of a recipe; one without autocast where it computes in fp32."""
    return torch.autocast(device, dtype=DTYPES[recipe.low]) if recipe.autocast else torch.autocast(device, enabled=False)


class BlockFormats:
    """Runs each block of a model in a region of its own, what stands before them in the first recipe, what stands behind in the last.

    Tensors that enter a block in fp32 are converted to it.

    Args:
        model: What is trained.
        blocks: Module paths, in the order in which they run.
        precision: With a recipe for each layer: what stands before the blocks, each block, what stands behind.

    Raises:
        StrategyError: Another number of layers.
        UnsupportedError: TF32 and fp32 side by side, which PyTorch switches for the whole process.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], precision: Precision) -> None:
        each = [recipe for count, recipe in precision.layers for _ in range(count)]
        if len(each) != len(blocks) + 2:
            raise StrategyError(
                f"precision={precision.name} names {len(each)} layers, but the model has {len(blocks)} blocks: give {len(blocks) + 2}, "
                "with one for what stands before the blocks and one for what stands behind"
            )
        wide = {recipe.arithmetic for recipe in each if not recipe.autocast}
        if len(wide) > 1:
            raise UnsupportedError(f"precision={precision.name}: PyTorch switches TF32 for the whole process; use fp32 or tf32, not both")
        if DType.TF32 in wide:
            torch.set_float32_matmul_precision("high")
        self._device = next((p.device.type for p in model.parameters()), "cpu")
        self._before, self._behind = each[0], each[-1]
        self._outside: ExitStack | None = None
        self._open: list[AbstractContextManager[Any]] = []
        modules = dict(model.named_modules())
        for name, recipe in zip(blocks, each[1:-1], strict=True):
            modules[name].register_forward_pre_hook(self._entering(recipe), with_kwargs=True)
            modules[name].register_forward_hook(self._leaving(name == blocks[-1]), always_call=True)

    @contextmanager
    def forward(self) -> Generator[None, None, None]:
        """Surrounds a forward pass."""
        with ExitStack() as stack:
            self._outside = stack
            stack.enter_context(region(self._before, self._device))
            yield
            self._outside = None

    def _entering(self, recipe: Precision) -> Callable[..., tuple[Any, Any]]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG001
            inside = region(recipe, self._device)
            inside.__enter__()
            self._open.append(inside)
            return (args, kwargs) if recipe.autocast else tree_map(_widened, (args, kwargs))

        return hook

    def _leaving(self, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            self._open.pop().__exit__(None, None, None)
            if last and self._outside is not None:  # not when the block is recomputed
                self._outside.enter_context(region(self._behind, self._device))

        return hook


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in DTYPES.values() else value


def gradient_exponents(
    model: nn.Module, loss: Callable[[], Tensor], *, blocks: Sequence[str] | None = None, scale: float = 1.0
) -> tuple[Exponents, ...]:
    """Counts the magnitudes of gradients in one backward pass: what leaves the first block, what reaches each block and the model's output.

    They are in the order of a workload's layers, as `st.choose_precision` takes them.

    Args:
        model: What is trained; its gradients are cleared.
        loss: Runs the model on a batch and returns its loss.
        blocks: Module paths; by default those that a capture finds.
        scale: What the loss is multiplied by.

    Raises:
        InputError: A model without blocks, or gradients that are all zero somewhere.
    """
    found = block_paths(model)
    names = list(blocks) if blocks is not None else [name for name, _ in model.named_modules() if name in found]
    if not names:
        raise InputError("no blocks were found in the model; name them with blocks=[...]")
    modules = dict(model.named_modules())
    counted: dict[str, dict[int, float]] = {}
    handles = [modules[names[0]].register_forward_pre_hook(lambda _, args: _watch(args[0], "before", counted))]
    handles += [modules[n].register_forward_hook(lambda _, __, out, n=n: _watch(out, n, counted)) for n in names]
    handles.append(model.register_forward_hook(lambda _, __, out: _watch(out, "behind", counted)))
    try:
        (loss() * scale).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    counted.setdefault("behind", counted.get(names[-1], {}))
    if missing := [n for n in ("before", *names, "behind") if not counted.get(n)]:
        raise InputError(f"no gradient that is not zero reaches {missing[0]}")
    return tuple(Exponents(counted[n], scale) for n in ("before", *names, "behind"))


def _watch(value: Any, name: str, counted: dict[str, dict[int, float]]) -> None:
    if isinstance(value, Tensor) and value.requires_grad and value.numel() > 1:
        value.register_hook(lambda gradient: counted.__setitem__(name, _counts(gradient)))  # type: ignore[no-untyped-call]


def _counts(gradient: Tensor) -> dict[int, float]:
    values = gradient.detach().float()
    exponents = torch.frexp(values[values != 0]).exponent - 1
    found, counts = torch.unique(exponents, return_counts=True)
    return {int(e): float(n) for e, n in zip(found.tolist(), counts.tolist(), strict=True)}


__all__ = ["DTYPES", "BlockFormats", "gradient_exponents", "region"]
