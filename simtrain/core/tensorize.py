"""How a strategy says that the weights of a model's blocks are products of small tensors: of which form, and of which ranks.

`low-rank:rank=64` replaces every linear layer of the blocks by two, `tucker:compression=4` every convolution by three, `tensor-train:...`
every convolution by four and every linear layer by a train of three cores (`simtrain.core.tensor_train`). One rank stands throughout, each
edge having at most what could change the weight; `compression=C` is the largest rank with which a weight becomes at least C times smaller.
A layer that would not become smaller stays. Ranks under an error depend on the weights: `simtrain.torch.tensorize(model, kind, error=...)`
finds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from simtrain.core.errors import StrategyError, nearest
from simtrain.core.tensor_train import Contraction, contraction, factors

TensorizeKind = Literal["low-rank", "tucker", "tensor-train"]
KINDS: tuple[TensorizeKind, ...] = ("low-rank", "tucker", "tensor-train")
FORMS = "none, low-rank:rank=64, tucker:compression=4 or tensor-train:rank=16"


@dataclass(frozen=True, slots=True)
class Tensorization:
    """A form of weights, with its rank or how many times smaller each shall be.

    Attributes:
        kind: "low-rank" (linear layers), "tucker" (convolutions) or "tensor-train" (both).
        rank: Of every edge; 0 where a compression is given.
        compression: How many times fewer elements each weight has at least; 0 where a rank is given.
    """

    kind: TensorizeKind
    rank: int = 0
    compression: float = 0.0

    def matrix_ranks(self, inner: int, outer: int) -> tuple[int, ...]:
        """The rank of a linear layer of these widths in two products; empty where the layer stays as it is.

        Args:
            inner: Width of its input.
            outer: Width of its output.
        """
        if self.kind != "low-rank":
            return ()
        return self._largest((min(inner, outer),), (inner, outer), (), inner * outer)

    def filter_ranks(self, inner: int, outer: int, rows: int, columns: int) -> tuple[int, ...]:
        """The ranks of a convolution: two of a Tucker form, three of a train; empty where it stays as it is.

        Args:
            inner: Channels read.
            outer: Channels written.
            rows: Of its window.
            columns: Of its window.
        """
        before = inner * outer * rows * columns
        if self.kind == "tucker":
            return self._largest((inner, outer), (inner, outer), (rows * columns,), before)
        if self.kind == "tensor-train":
            most = (inner, min(inner * rows, outer * columns), outer)
            return self._largest(most, (inner, outer), (rows, columns), before)
        return ()

    def matrix_train(self, inner: int, outer: int) -> Contraction | None:
        """A linear layer of these widths as a train of three cores; `None` where it stays as it is.

        Args:
            inner: Width of its input.
            outer: Width of its output.
        """
        if self.kind != "tensor-train":
            return None
        ins, outs = factors(inner), factors(outer)
        cores = [a * b for a, b in zip(ins, outs, strict=True)]
        most = tuple(min(math.prod(cores[: k + 1]), math.prod(cores[k + 1 :])) for k in range(len(cores) - 1))
        ranks = self._largest(most, (cores[0], cores[-1]), tuple(cores[1:-1]), math.prod(cores))
        return contraction(ins, outs, ranks) if ranks else None

    def _largest(self, most: tuple[int, ...], ends: tuple[int, int], between: tuple[int, ...], before: int) -> tuple[int, ...]:
        """Ranks of a chain of cores from one end to the other, each `between` two edges; with a compression, the largest that keep it."""

        def ranks(rank: int) -> tuple[int, ...]:
            return tuple(min(rank, m) for m in most)

        def elements(rank: int) -> int:
            r = ranks(rank)
            return ends[0] * r[0] + sum(a * w * b for a, w, b in zip(r[:-1], between, r[1:], strict=True)) + r[-1] * ends[1]

        rank, wanted = self.rank, before / self.compression if self.compression else before - 1
        if not rank:
            low, high = 1, max(most)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if elements(middle) <= wanted else (low, middle - 1)
            rank = low
        return ranks(rank) if elements(rank) <= min(wanted, before - 1) else ()


def parse_tensorize(text: str) -> Tensorization | None:
    """Reads what a strategy says of its weights; `None` where they are whole.

    Args:
        text: Such as "none", "low-rank:rank=64" or "tucker:compression=4".

    Raises:
        StrategyError: An unknown form (with the nearest match), or neither a rank of at least 1 nor a compression above 1.
    """
    if text == "none":
        return None
    kind, colon, target = text.partition(":")
    if kind not in KINDS:
        near = nearest(kind, KINDS, count=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed are {FORMS}"
        raise StrategyError(f"tensorize={text}: {kind!r} is no form of weights: {hint}")
    name, equals, value = target.partition("=")
    if name == "error" and equals:
        raise StrategyError(
            f"tensorize={text}: ranks under an error depend on the weights; convert the model by simtrain.torch.tensorize(model, {kind!r}, "
            "error=...) and capture it, or give rank= or compression="
        )
    if name == "rank" and equals and value.isascii() and value.isdecimal() and int(value) >= 1:
        return Tensorization(kind, rank=int(value))
    if name == "compression" and equals and (compression := _number(value)) > 1:
        return Tensorization(kind, compression=compression)
    given = f"not {target!r}" if colon else "and neither is given"
    raise StrategyError(
        f"tensorize={text}: {kind} needs a rank of at least 1 ({kind}:rank=16) or a compression above 1 ({kind}:compression=4), {given}"
    )


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


__all__ = ["FORMS", "KINDS", "Tensorization", "TensorizeKind", "parse_tensorize"]
