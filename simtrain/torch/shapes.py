"""Tensors with shapes and no values, on which every operator runs that runs on a GPU."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_GROUPED = torch.ops.aten._grouped_mm.default
_ROW_BYTES = 16
"""Rows of a grouped product begin at multiples of so many bytes (PyTorch, ATen/native/GroupedMMUtils.h)."""


class ShapesMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """PyTorch's mode, with grouped products in every format: its own rule for their shapes takes bf16 alone, its kernels do not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _GROUPED and args[0].dtype is not torch.bfloat16:
            return grouped_shape(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def grouped_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """Returns what a grouped product of two tensors returns, without values."""
    del bias
    groups = (offs.shape[0],) if offs is not None and a.ndim == b.ndim == 2 else a.shape[:1] if a.ndim == b.ndim == 3 else ()
    dtype = out_dtype or a.dtype
    multiple = _ROW_BYTES // dtype.itemsize
    shape = (*groups, a.shape[-2], b.shape[-1])
    row = -(-shape[-1] // multiple) * multiple
    strides = (*(prod(shape[1:-1]) * row for _ in groups), row, 1)
    return a.new_empty_strided(shape, strides, dtype=dtype)
