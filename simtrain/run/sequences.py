"""Sequences of unequal length: what padding wastes, what packing saves, and what imbalance costs when ranks wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray

Lengths = Sequence[int] | FloatArray


def padded_efficiency(lengths: Lengths, batch: int) -> float:
    """Returns the share of tokens that are no padding when random batches are padded to their longest sequence.

    Mean over the expected maximum of `batch` draws without replacement, which is exact: the i-th smallest of n is the longest of a batch
    with probability C(i - 1, batch - 1) / C(n, batch).

    Args:
        lengths: Of the data set, or a sample of it.
        batch: Sequences per batch.

    Raises:
        InputError: No lengths, a length below one, or a larger batch than there are sequences.
    """
    ordered = np.sort(_checked(lengths))
    count = len(ordered)
    if not 1 <= batch <= count:
        raise InputError(f"a batch of {batch!r} does not come out of {count} sequences")
    at_most = np.ones(count)  # probability that the whole batch is among the i + 1 shortest, as a product that cannot overflow
    for drawn in range(batch):
        at_most *= np.clip(np.arange(1, count + 1) - drawn, 0, None) / (count - drawn)
    longest = float(np.diff(at_most, prepend=0.0) @ ordered)
    return float(ordered.mean() / longest)


def bucketed_efficiency(lengths: Lengths, batch: int) -> float:
    """Returns the same when sequences are sorted by length first, so that a batch holds neighbours; an incomplete last batch counts."""
    ordered = np.sort(_checked(lengths))
    if batch < 1:
        raise InputError(f"a batch has one sequence or more, not {batch!r}")
    padded = sum(float(part[-1]) * len(part) for part in np.split(ordered, range(batch, len(ordered), batch)))
    return float(ordered.sum() / padded)


@dataclass(frozen=True, slots=True)
class Packing:
    """Sequences packed into rows of one capacity.

    Attributes:
        rows: Indices of the sequences in each row.
        efficiency: Share of tokens that are no padding.
        attention: Sum of squared lengths over rows times squared capacity: the part of full attention that is within sequences, and so
            what a mask by sequence leaves to compute.
    """

    rows: tuple[tuple[int, ...], ...]
    efficiency: float
    attention: float


def pack(lengths: Lengths, capacity: int) -> Packing:
    """Packs sequences into rows, the longest first and each into the first row that still holds it (first-fit decreasing).

    Args:
        lengths: Of the sequences.
        capacity: Tokens of a row.

    Raises:
        InputError: A sequence is longer than a row.
    """
    values = _checked(lengths)
    if values.max() > capacity:
        raise InputError(f"a sequence of {int(values.max())} tokens does not fit into rows of {capacity}: cut it, or take longer rows")
    left = np.empty(len(values))
    rows: list[list[int]] = []
    for index in np.argsort(-values, kind="stable").tolist():
        open_rows = np.flatnonzero(left[: len(rows)] >= values[index])
        row = int(open_rows[0]) if len(open_rows) else len(rows)
        if row == len(rows):
            left[row] = capacity
            rows.append([])
        left[row] -= values[index]
        rows[row].append(index)
    return Packing(
        rows=tuple(tuple(row) for row in rows),
        efficiency=float(values.sum() / (len(rows) * capacity)),
        attention=float((values**2).sum() / (len(rows) * capacity**2)),
    )


def imbalance(
    lengths: Lengths, sequences_per_rank: int, ranks: int, *, token_s: float = 1.0, pair_s: float = 0.0, draws: int = 1000, seed: int = 0
) -> float:
    """Returns how much longer the slowest rank computes than the mean rank, when each draws its sequences at random and none is padded.

    Args:
        lengths: Of the data set, or a sample of it.
        sequences_per_rank: In a step.
        ranks: That wait for each other.
        token_s: Time of a token.
        pair_s: Time of a pair of tokens within a sequence (attention).
        draws: Steps drawn.
        seed: Of the draws.

    Returns:
        Mean over steps of (slowest / mean), 1 where all are equal.

    Raises:
        InputError: Counts below one, or no work.
    """
    values = _checked(lengths)
    if min(sequences_per_rank, ranks, draws) < 1 or token_s < 0 or pair_s < 0 or token_s + pair_s == 0:
        raise InputError("sequences_per_rank, ranks and draws are 1 or more; token_s and pair_s not below zero, and not both zero")
    work = token_s * values + pair_s * values**2
    rng = np.random.default_rng(seed)
    loads = np.stack([work[rng.integers(len(work), size=(ranks, sequences_per_rank))].sum(1) for _ in range(draws)])
    return float(np.mean(loads.max(1)) / np.mean(loads))


def _checked(lengths: Lengths) -> FloatArray:
    values = np.asarray(lengths, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.all(np.isfinite(values)) or values.min() < 1:
        raise InputError("lengths are a list of numbers of tokens from 1 up")
    return values
