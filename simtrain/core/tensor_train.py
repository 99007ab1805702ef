"""A linear layer whose weight is a train of cores: in which order its input meets them, and which of them are laid out anew on the way.

The order is opt_einsum's cheapest one for many rows. Each of its steps is one matrix product, an operand of which is copied where its axes
do not lie as the product needs them; layouts are chosen so that as little as possible is copied. What an order costs grows evenly with the
rows (`fixed + per_row x rows`), so that the one that is cheapest for many rows is so from some number of rows on (`Contraction.best_from`).
The real layer (`simtrain.torch.tensorized`) and the closed form (`workloads.common.trains`) both follow this plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

MANY = 1 << 40
"""Rows that stand for any large number of them."""

MOST_CORES = 6
"""Of a train: layouts of more are too many to try all."""

_ROW = "a"
_LETTERS = "bcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a product, as a matrix.

    Attributes:
        place: 0 for the input, then the cores, then the results of steps, in order.
        axes: Its axes in the order in which the matrix has them.
        copied: Whether they do not lie so in memory.
    """

    place: int
    axes: tuple[int, ...]
    copied: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One matrix product, `left @ right`.

    Attributes:
        left: First operand; the one with the rows of the input, if either has them.
        right: Second operand.
        extents: Of the matrices: written rows, written columns, summed; without the rows of the input.
        has_rows: Whether the first extent is to be multiplied by the rows of the input.
        result: Axes of the result, without the rows, which stand first where it has them.
    """

    left: Operand
    right: Operand
    extents: tuple[int, int, int]
    has_rows: bool
    result: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Of the product, to be multiplied by the rows where it has them: two for every product summed."""
        return 2 * math.prod(self.extents)


@dataclass(frozen=True)
class Contraction:
    """The order in which an input meets the cores of a train.

    Attributes:
        inner: Factors of the input's width.
        outer: Factors of the output's width.
        ranks: Between cores.
        steps: One fewer than operands.
        last: Axes of the last result in the order of the output.
    """

    inner: tuple[int, ...]
    outer: tuple[int, ...]
    ranks: tuple[int, ...]
    steps: tuple[Step, ...]
    last: tuple[int, ...]

    @property
    def reordered(self) -> bool:
        """Whether the last result is copied into the order of the output."""
        return self.last != tuple(range(len(self.last)))

    @property
    def makes_weight(self) -> bool:
        """Whether the cores are multiplied to the whole weight, which the input then meets as it would any other."""
        return self.steps[-1].left.place == 0 and not self.reordered

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the cores as operands: without the rank of 1 at either end."""
        edges = [(), *((r,) for r in self.ranks), ()]
        return tuple((*a, i, o, *b) for a, i, o, b in zip(edges[:-1], self.inner, self.outer, edges[1:], strict=True))

    def flops(self, rows: int) -> int:
        """Of a forward pass over so many rows."""
        return sum(step.flops * (rows if step.has_rows else 1) for step in self.steps)

    def excess(self, rows: int) -> float:
        """FLOPs over those of the best order for so many rows."""
        return self.flops(rows) / _cheapest(self.inner, self.outer, self.ranks, rows)[1]

    @cached_property
    def best_from(self) -> int:
        """Rows from which on no order takes fewer FLOPs, if it was chosen for many of them."""
        low, high = 1, MANY
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.excess(middle) <= 1 else (middle + 1, high)
        return low


@lru_cache(maxsize=1024)
def contraction(inner: tuple[int, ...], outer: tuple[int, ...], ranks: tuple[int, ...], rows: int = MANY) -> Contraction:
    """Finds the cheapest order, with the fewest copies that it allows.

    Args:
        inner: Factors of the input's width.
        outer: Factors of the output's width.
        ranks: Between cores.
        rows: Of the input.
    """
    plans = _layouts(inner, outer, ranks, _cheapest(inner, outer, ranks, rows)[0])
    return min(plans, key=lambda plan: plan[0])[1]


def factors(width: int, count: int = 3) -> tuple[int, ...]:
    """Splits a width into so many factors, as equal as they can be."""
    if count == 1:
        return (width,)
    target = width ** (1 / count)
    best = min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(math.log(d / target)))
    return (best, *factors(width // best, count - 1))


def _terms(inner: Sequence[int], outer: Sequence[int], ranks: Sequence[int]) -> tuple[list[str], str, dict[str, int]]:
    """Names of the axes of input and cores, those of the output, and their extents (but for the rows)."""
    count = len(inner)
    ins, outs, edges = _LETTERS[:count], _LETTERS[count : 2 * count], _LETTERS[2 * count : 3 * count - 1]
    cores = [("" if k == 0 else edges[k - 1]) + ins[k] + outs[k] + edges[k : k + 1] for k in range(count)]
    return [_ROW + ins, *cores], _ROW + outs, dict(zip(ins + outs + edges, (*inner, *outer, *ranks), strict=True))


@lru_cache(maxsize=8192)
def _cheapest(inner: tuple[int, ...], outer: tuple[int, ...], ranks: tuple[int, ...], rows: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Pairs of operands in the cheapest order (by place), and its FLOPs."""
    from opt_einsum import contract_path

    terms, target, extents = _terms(inner, outer, ranks)
    sizes = {**extents, _ROW: rows}
    shapes = [tuple(sizes[c] for c in term) for term in terms]
    equation = f"{','.join(terms)}->{target}"
    path, _ = contract_path(equation, *shapes, shapes=True, optimize="optimal" if len(terms) < 6 else "dp")
    places, pairs, flops = list(range(len(terms))), [], 0
    for pair in path:
        a, b = (places.pop(i) for i in sorted(pair, reverse=True))
        pairs.append((min(a, b), max(a, b)))
        flops += 2 * math.prod(sizes[c] for c in set(terms[a] + terms[b]))
        places.append(len(terms))
        terms.append("".join(sorted(set(terms[a]) ^ set(terms[b]))))
    return tuple(pairs), flops


def _layouts(
    inner: tuple[int, ...], outer: tuple[int, ...], ranks: tuple[int, ...], pairs: tuple[tuple[int, int], ...]
) -> Iterator[tuple[tuple[int, int], Contraction]]:
    """Every way to lay out the products of one order, with the elements it copies (for each row, and once)."""
    first, target, extents = _terms(inner, outer, ranks)

    def size(axes: str) -> int:
        return math.prod(extents[c] for c in axes if c != _ROW)

    for choices in product(product((False, True), repeat=2), repeat=len(pairs)):
        terms, copied = list(first), [0, 0]
        steps: list[Step] = []
        for pair, (turned, by_right) in zip(pairs, choices, strict=True):
            with_rows = [place for place in pair if _ROW in terms[place]]
            places = (with_rows[0], sum(pair) - with_rows[0]) if with_rows else pair[::-1] if turned else pair
            left, right = (terms[place] for place in places)
            summed = "".join(c for c in (right if by_right else left) if c in left and c in right)
            free = ["".join(c for c in term if c not in summed) for term in (left, right)]
            if turned and len(steps) == len(pairs) - 1:
                free = ["".join(c for c in target if c in axes) for axes in free]
            sides = (_side(places[0], left, free[0], summed), _side(places[1], right, summed, free[1]))
            for side in sides:
                copied[_ROW not in terms[side.place]] += side.copied * size(terms[side.place])
            result = free[0] + free[1]
            has_rows = bool(with_rows)
            extent = (size(free[0]), size(free[1]), size(summed))
            steps.append(Step(*sides, extent, has_rows, tuple(extents[c] for c in result if c != _ROW)))
            terms.append(result)
        last = tuple(terms[-1].index(c) for c in target)
        copied[0] += (terms[-1] != target) * size(target)
        yield (copied[0], copied[1]), Contraction(inner, outer, ranks, tuple(steps), last)


def _side(place: int, term: str, rows: str, columns: str) -> Operand:
    """An operand as a matrix: a view where its axes are those of the rows, then those of the columns, or the other way around."""
    axes = tuple(term.index(c) for c in rows + columns)
    return Operand(place, axes, copied=term not in (rows + columns, columns + rows))


__all__ = ["MANY", "MOST_CORES", "Contraction", "Operand", "Step", "contraction", "factors"]
