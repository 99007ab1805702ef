"""Linear layers and convolutions whose weight is a product of small tensors: low rank, Tucker, tensor train.

Each is an ordinary module, so a captured model with such layers is a workload with their operators, casts, activations and gradients.
`simtrain.torch.tensor_conversion` converts trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from simtrain.core.errors import InputError

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


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

    The input meets the cores in the order that takes the fewest operations for its number of rows (`opt_einsum`).

    Args:
        inner: Factors of the input's width.
        outer: Factors of the output's width, as many.
        ranks: Between neighbouring cores, one fewer.
        bias: Whether there is one.
    """

    def __init__(self, inner: Sequence[int], outer: Sequence[int], ranks: Sequence[int], *, bias: bool = True) -> None:
        super().__init__()
        if not len(inner) == len(outer) == len(ranks) + 1:
            raise InputError(f"a train of {len(inner)} input and {len(outer)} output factors needs one rank fewer, not {len(ranks)}")
        pairs = [a * b for a, b in zip(inner, outer, strict=True)]
        most = [min(math.prod(pairs[: k + 1]), math.prod(pairs[k + 1 :])) for k in range(len(ranks))]
        _check_ranks(ranks, most)
        self.inner, self.outer = tuple(inner), tuple(outer)
        edges = (1, *ranks, 1)
        shapes = zip(edges[:-1], inner, outer, edges[1:], strict=True)
        scale = math.prod(inner) ** (-0.5 / len(inner))
        self.cores = nn.ParameterList([nn.Parameter(scale * torch.randn(*shape) / math.sqrt(shape[0])) for shape in shapes])
        self.bias = nn.Parameter(torch.zeros(math.prod(outer))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """One product after the other, pairs in the cheapest order."""
        rows = x.reshape(-1, *self.inner)
        operands: list[Tensor] = [rows, *self.cores]
        for pair, subscripts in contraction(self.inner, self.outer, self._ranks, rows.shape[0]).steps:
            a, b = (operands.pop(i) for i in sorted(pair, reverse=True))
            operands.append(torch.einsum(subscripts, a, b))
        y = operands[0].reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        """The weight that it stands for."""
        whole: Tensor = self.cores[0][0]
        for core in list(self.cores)[1:]:
            whole = torch.einsum("ior,rjps->ijops", whole, core).flatten(0, 1).flatten(1, 2)
        return whole[..., 0].T

    @property
    def _ranks(self) -> tuple[int, ...]:
        return tuple(int(core.shape[3]) for core in list(self.cores)[:-1])


@dataclass(frozen=True, slots=True)
class Contraction:
    """The order in which an input meets the cores of a train.

    Attributes:
        steps: Positions of each pair, and its subscripts (the later operand first, as they are taken).
        flops: Of a forward pass.
        between: Elements of every intermediate result, the last one being the output.
    """

    steps: tuple[tuple[tuple[int, ...], str], ...]
    flops: int
    between: tuple[int, ...]


@lru_cache(maxsize=1024)
def contraction(inner: tuple[int, ...], outer: tuple[int, ...], ranks: tuple[int, ...], rows: int) -> Contraction:
    """Finds the cheapest order for a number of rows: two operations for every product summed.

    Args:
        inner: Factors of the input's width.
        outer: Factors of the output's width.
        ranks: Between cores.
        rows: Of the input.
    """
    from opt_einsum import contract_path

    count = len(inner)
    letters = iter(_LETTERS)
    row, ins, outs = next(letters), [next(letters) for _ in inner], [next(letters) for _ in outer]
    edges = [next(letters) for _ in range(count + 1)]
    sizes = {row: rows, **dict(zip(ins, inner, strict=True)), **dict(zip(outs, outer, strict=True))}
    sizes |= dict(zip(edges, (1, *ranks, 1), strict=True))
    terms = [row + "".join(ins), *(edges[k] + ins[k] + outs[k] + edges[k + 1] for k in range(count))]
    target = row + "".join(outs)
    shapes = [tuple(sizes[c] for c in term) for term in terms]
    path, _ = contract_path(f"{','.join(terms)}->{target}", *shapes, shapes=True, optimize="optimal" if count < 6 else "dp")
    steps, flops, between = [], 0, []
    for pair in path:
        a, b = (terms.pop(i) for i in sorted(pair, reverse=True))
        rest = set("".join(terms)) | set(target)
        result = "".join(c for c in dict.fromkeys(a + b) if c in rest) if terms else target
        steps.append((tuple(pair), f"{a},{b}->{result}"))
        flops += 2 * math.prod(sizes[c] for c in set(a + b))
        between.append(math.prod(sizes[c] for c in result))
        terms.append(result)
    return Contraction(tuple(steps), flops, tuple(between))


def _check_ranks(ranks: Sequence[int], most: Sequence[int]) -> None:
    for rank, limit in zip(ranks, most, strict=True):
        if not 1 <= rank <= limit:
            raise InputError(f"rank {rank} must lie between 1 and {limit}: more could not change the weight")


__all__ = ["Contraction", "LowRankLinear", "TensorTrainConv2d", "TensorTrainLinear", "TuckerConv2d", "contraction"]
