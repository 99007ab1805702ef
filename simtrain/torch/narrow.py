"""Linear layers of real models in fp8, with scales of the tensors at hand (`precision=fp8-current`).

Every operand of the three products of a linear layer is scaled to the largest magnitude of its format and rounded: E4M3 for inputs and
weights, E5M2 for gradients (Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv 2209.05433). Products accumulate in fp32 and
are written in the model's format. Between forward and backward the narrow copies are kept, not the originals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from simtrain.core.precision import Precision
from simtrain.step.narrow_check import devices_with

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Rows and columns of operands are multiples of this, which `torch._scaled_mm` asks of CUDA devices; samples are padded with zeros."""

SINCE = (8, 9)
"""Compute capability since which NVIDIA's tensor cores multiply fp8."""


def check_narrow(recipe: Precision, model: nn.Module, device: torch.device) -> str:
    """Refuses what is not carried out in fp8; returns what must be said of it.

    Args:
        recipe: With a narrow format.
        model: In bf16.
        device: Where it is.

    Raises:
        UnsupportedError: Another recipe than `fp8-current`, or a device without fp8 products (with those that have them).
        InputError: A model whose weights are not in bf16.
    """
    if recipe.narrow is None or recipe.name != "fp8-current":
        raise UnsupportedError(
            f"precision={recipe.name} is not carried out here: scales that outlive a step, scales per block and weights in fp8 alone are "
            "Transformer Engine's; use fp8-current, an -amp recipe or fp32"
        )
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < SINCE:
        name = torch.cuda.get_device_name(device)
        raise UnsupportedError(
            f"precision={recipe.name} needs fp8 products, which {name} has not: use bf16-amp, or one of "
            f"{', '.join(devices_with(recipe.narrow))}"
        )
    if wide := [name for name, p in model.named_parameters() if p.dtype is not torch.bfloat16]:
        raise InputError(
            f"precision={recipe.name} quantizes a model in bf16, and {wide[0]} is not: call model.to(torch.bfloat16), and give it an "
            "optimizer that keeps fp32 copies of the weights"
        )
    where = "" if device.type == "cuda" else "fp8 products are emulated on the CPU: numbers hold, times do not; "
    return f"{where}fp32 copies of the weights are the optimizer's to keep"


def quantize_blocks(model: nn.Module, blocks: Sequence[str]) -> tuple[str, ...]:
    """Lets the linear layers inside some modules compute in fp8, in place; parameters stay what they are.

    Args:
        model: What is trained.
        blocks: Module paths.

    Returns:
        Module paths of the layers; those whose sizes are no multiples of 16 stay as they are.

    Raises:
        StrategyError: There is none.
    """
    found = []
    for name, layer in list(model.named_modules()):
        inside = any(name == b or name.startswith(f"{b}.") for b in blocks)
        if inside and type(layer) is nn.Linear and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0:
            layer.__class__ = NarrowLinear
            found.append(name)
    if not found:
        raise StrategyError(f"fp8: the blocks of {type(model).__name__} have no nn.Linear whose sizes are multiples of {MULTIPLE}")
    return tuple(found)


class NarrowLinear(nn.Linear):
    """A linear layer whose products are of fp8 operands."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies in fp8 and adds the bias in the model's format."""
        product: Tensor = _Product.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = _padded(x.reshape(-1, x.shape[-1]))
        narrow_x, scale_x = _narrow(rows, FORWARD)
        narrow_w, scale_w = _narrow(weight, FORWARD)
        ctx.save_for_backward(narrow_x, scale_x, narrow_w, scale_w)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        written = _product(narrow_x, scale_x, narrow_w, scale_w, x.dtype)
        return written[: x.numel() // x.shape[-1]].reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        narrow_x, scale_x, narrow_w, scale_w = ctx.saved_tensors
        narrow_g, scale_g = _narrow(_padded(gradient.reshape(-1, gradient.shape[-1])), BACKWARD)
        to_input = _product(narrow_g, scale_g, _transposed(narrow_w), scale_w, ctx.dtype)
        to_weight = _product(_transposed(narrow_g), scale_g, _transposed(narrow_x), scale_x, ctx.dtype)
        return to_input[: ctx.shape.numel() // ctx.shape[-1]].reshape(ctx.shape), to_weight


def _padded(rows: Tensor) -> Tensor:
    return functional.pad(rows, (0, 0, 0, -rows.shape[0] % MULTIPLE))


def _narrow(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns a tensor in a narrow format and the scale that it is to be multiplied with."""
    scale = tensor.abs().amax().float().clamp_min(1e-12) / torch.finfo(dtype).max
    return (tensor.float() / scale).to(dtype), scale


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


def _product(left: Tensor, scale_left: Tensor, right: Tensor, scale_right: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the left times rows of the right."""
    product: Tensor = torch._scaled_mm(left, right.t(), scale_left, scale_right, out_dtype=dtype)
    return product


__all__ = ["NarrowLinear", "check_narrow", "quantize_blocks"]
