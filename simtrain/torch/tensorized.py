"""Linear layers and convolutions whose weight is a product of small tensors: low rank, Tucker, tensor train.

Each is an ordinary module, so a captured model with such layers is a workload with their operators, casts, activations and gradients.
`simtrain.torch.tensor_conversion` converts trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simtrain.core.errors import InputError
from simtrain.core.tensor_train import MANY, MOST_CORES, Step, contraction


class LowRankLinear(nn.Module):
    """`y = U (V x) + b` with as many rows of V as the rank.

    Args:
        inner: Width of the input.
        outer: Width of the output.
        rank: Width between.
        bias: Whether there is one.
    """

    def __init__(self, inner: int, outer: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        _check_ranks((rank,), (min(inner, outer),))
        self.v = nn.Linear(inner, rank, bias=False)
        self.u = nn.Linear(rank, outer, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Two matrix products."""
        y: Tensor = self.u(self.v(x))
        return y

    def dense(self) -> Tensor:
        """The weight that it stands for."""
        return self.u.weight @ self.v.weight


class TuckerConv2d(nn.Module):
    """A 1x1 convolution to fewer channels, the window on these, and a 1x1 convolution to all channels.

    Args:
        like: Whose window, stride, padding and channels it takes.
        ranks: Channels between, of the input's side and of the output's.
    """

    def __init__(self, like: nn.Conv2d, ranks: tuple[int, int]) -> None:
        super().__init__()
        _check_ranks(ranks, (like.in_channels, like.out_channels))
        into, out = ranks
        window: Any = {"stride": like.stride, "padding": like.padding, "dilation": like.dilation, "bias": False}
        self.narrow = nn.Conv2d(like.in_channels, into, 1, bias=False)
        self.core = nn.Conv2d(into, out, like.kernel_size, **window)  # type: ignore[arg-type]
        self.widen = nn.Conv2d(out, like.out_channels, 1, bias=like.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Three convolutions."""
        y: Tensor = self.widen(self.core(self.narrow(x)))
        return y

    def dense(self) -> Tensor:
        """The filter that it stands for."""
        core = torch.einsum("oikl,ij->ojkl", self.core.weight, self.narrow.weight[:, :, 0, 0])
        return torch.einsum("po,ojkl->pjkl", self.widen.weight[:, :, 0, 0], core)


class TensorTrainConv2d(nn.Module):
    """A train through input channels, rows, columns and output channels of the window: four convolutions.

    Args:
        like: Whose window, stride, padding and channels it takes.
        ranks: Channels between, three of them.
    """

    def __init__(self, like: nn.Conv2d, ranks: tuple[int, int, int]) -> None:
        super().__init__()
        if isinstance(like.padding, str):
            raise InputError(f"padding by name ({like.padding!r}) has no place in a train: give numbers of pixels")
        (rows, columns), (down, across), (top, left), (dy, dx) = like.kernel_size, like.stride, like.padding, like.dilation
        _check_ranks(ranks, (like.in_channels, min(like.in_channels * rows, like.out_channels * columns), like.out_channels))
        first, second, third = ranks
        self.narrow = nn.Conv2d(like.in_channels, first, 1, bias=False)
        self.rows = nn.Conv2d(first, second, (rows, 1), (down, 1), (top, 0), (dy, 1), bias=False)
        self.columns = nn.Conv2d(second, third, (1, columns), (1, across), (0, left), (1, dx), bias=False)
        self.widen = nn.Conv2d(third, like.out_channels, 1, bias=like.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Four convolutions."""
        y: Tensor = self.widen(self.columns(self.rows(self.narrow(x))))
        return y

    def dense(self) -> Tensor:
        """The filter that it stands for."""
        cores = self.widen.weight[:, :, 0, 0], self.columns.weight[:, :, 0], self.rows.weight[:, :, :, 0], self.narrow.weight[:, :, 0, 0]
        return torch.einsum("oc,cbl,bak,ai->oikl", *cores)


class TensorTrainLinear(nn.Module):
    """A weight as a train of cores, each with one factor of the input's and of the output's width.

    The input meets the cores in the order that takes the fewest operations for many rows (`simtrain.core.tensor_train`), one matrix product
    after the other. It does not change with the rows, so that a captured model holds at every batch size; `plan.excess(rows)` says how
    much more than the best order for so many rows it takes, `plan.best_from` from how many on there is none better.

    Args:
        inner: Factors of the input's width.
        outer: Factors of the output's width, as many.
        ranks: Between neighbouring cores, one fewer.
        bias: Whether there is one.
        rows: For which the order is chosen; for many by default.
    """

    def __init__(self, inner: Sequence[int], outer: Sequence[int], ranks: Sequence[int], *, bias: bool = True, rows: int = MANY) -> None:
        super().__init__()
        if not len(inner) == len(outer) == len(ranks) + 1:
            raise InputError(f"a train of {len(inner)} input and {len(outer)} output factors needs one rank fewer, not {len(ranks)}")
        if len(inner) > MOST_CORES:
            raise InputError(f"a train has at most {MOST_CORES} cores, not {len(inner)}: give fewer factors")
        pairs = [a * b for a, b in zip(inner, outer, strict=True)]
        most = [min(math.prod(pairs[: k + 1]), math.prod(pairs[k + 1 :])) for k in range(len(ranks))]
        _check_ranks(ranks, most)
        self.plan = contraction(tuple(inner), tuple(outer), tuple(ranks), rows)
        edges = (1, *ranks, 1)
        shapes = zip(edges[:-1], inner, outer, edges[1:], strict=True)
        scale = math.prod(inner) ** (-0.5 / len(inner))
        self.cores = nn.ParameterList([nn.Parameter(scale * torch.randn(*shape) / math.sqrt(shape[0])) for shape in shapes])
        self.bias = nn.Parameter(torch.zeros(math.prod(outer))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """One matrix product after the other."""
        plan = self.plan
        cores = (core.reshape(shape) for core, shape in zip(self.cores, plan.shapes, strict=True))
        operands = dict(enumerate((x.reshape(-1, *plan.inner), *cores)))
        for place, step in enumerate(plan.steps, start=len(operands)):
            bias = self.bias if plan.makes_weight and step is plan.steps[-1] else None
            operands[place] = _multiply(operands.pop(step.left.place), operands.pop(step.right.place), step, bias)
        y: Tensor = operands.popitem()[1].permute(plan.last).reshape(*x.shape[:-1], -1)
        return y if self.bias is None or plan.makes_weight else y + self.bias.to(y.dtype)

    def dense(self) -> Tensor:
        """The weight that it stands for."""
        whole: Tensor = self.cores[0][0]
        for core in list(self.cores)[1:]:
            whole = torch.einsum("ior,rjps->ijops", whole, core).flatten(0, 1).flatten(1, 2)
        return whole[..., 0].T


def _multiply(left: Tensor, right: Tensor, step: Step, bias: Tensor | None) -> Tensor:
    """A step of a train; operands are copied only where their axes do not lie as the product needs them."""
    _, columns, summed = step.extents
    a = left.permute(step.left.axes).reshape(-1, summed)
    b = right.permute(step.right.axes).reshape(summed, columns)
    y = a @ b if bias is None else torch.addmm(bias, a, b)
    return y.view(-1, *step.result) if step.has_rows else y.view(step.result)


def _check_ranks(ranks: Sequence[int], most: Sequence[int]) -> None:
    for rank, limit in zip(ranks, most, strict=True):
        if not 1 <= rank <= limit:
            raise InputError(f"rank {rank} must lie between 1 and {limit}: more could not change the weight")


__all__ = ["LowRankLinear", "TensorTrainConv2d", "TensorTrainLinear", "TuckerConv2d"]
