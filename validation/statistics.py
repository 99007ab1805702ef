"""Statistics of predictions beside measurements: best null constants, intervals over groups, ranks and regret, what fits and what not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray

BOOTSTRAP_DRAWS = 2000
TIE = 1e-9
"""Predictions closer than this, relative, are a tie: the choice between them is by chance."""


def best_constant(ratios: Sequence[float]) -> float:
    """Returns the factor k that minimises the mean of |k r - 1|, exactly.

    It is the median of 1/r weighted by r, because |k r - 1| = r |k - 1/r|.

    Args:
        ratios: Predicted over measured, of a prediction whose scale is free.

    Raises:
        InputError: No ratios, or one that is not positive.
    """
    values = np.asarray(ratios, dtype=np.float64)
    if not len(values) or not (values > 0).all():
        raise InputError("a null constant needs ratios above 0, and at least one")
    order = np.argsort(1 / values)
    weights = np.cumsum(values[order])
    return float((1 / values)[order][np.searchsorted(weights, weights[-1] / 2)])


def held_out_constants(ratios: Sequence[float], pools: Sequence[Hashable], groups: Sequence[Hashable]) -> list[float | None]:
    """Returns for every row the best constant of its pool with the row's group left out; `None` where nothing else is in the pool.

    Args:
        ratios: As for `best_constant`.
        pools: What shares a constant (such as device and arithmetic path).
        groups: What is left out together (such as the model).
    """
    found: dict[tuple[Hashable, Hashable], float | None] = {}
    for key in dict.fromkeys(zip(pools, groups, strict=True)):
        others = [r for r, pool, group in zip(ratios, pools, groups, strict=True) if pool == key[0] and group != key[1]]
        found[key] = best_constant(others) if others else None
    return [found[key] for key in zip(pools, groups, strict=True)]


def interval_of_mean(
    values: Sequence[float], groups: Sequence[Hashable], *, level: float = 0.9, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> tuple[float, float] | None:
    """Returns a bootstrap interval of the mean, drawing whole groups with replacement: rows of one model or layout err together.

    Args:
        values: One per row.
        groups: The group of each row.
        level: Probability that it should hold.
        draws: Resamplings.
        seed: Of the random numbers.

    Returns:
        Lower and upper end; `None` with fewer than three groups, where resampling says nothing.
    """
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(index) < 3:
        return None
    which = np.array([index[g] for g in groups])
    sums = np.bincount(which, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(which)
    picked = np.random.default_rng(seed).integers(len(index), size=(draws, len(index)))
    means = sums[picked].sum(axis=1) / counts[picked].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Choice:
    """Alternatives that one would choose among: predicted and measured cost (time; less is better) of each, in one order."""

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.predicted) != len(self.measured) or len(self.measured) < 2:
            raise InputError("a choice needs at least two alternatives, each predicted and measured")

    @property
    def picked(self) -> FloatArray:
        """Measured costs of the alternatives that the prediction takes for the best (several where it ties)."""
        predicted = np.asarray(self.predicted)
        best = predicted.min()
        measured: FloatArray = np.asarray(self.measured, dtype=np.float64)
        return np.asarray(measured[predicted <= best * (1 + TIE)], dtype=np.float64)

    @property
    def regret(self) -> float:
        """How much more the pick costs than the best, relative; the mean over ties."""
        return float(self.picked.mean() / min(self.measured) - 1)

    @property
    def random_regret(self) -> float:
        """What picking by chance costs on average."""
        return float(np.mean(self.measured) / min(self.measured) - 1)

    @property
    def hit(self) -> float:
        """Probability that the pick is the best."""
        return float((self.picked <= min(self.measured)).mean())

    @property
    def pairwise(self) -> tuple[float, int]:
        """Pairs of different measured cost that are predicted in the right order (a tie counts half), and how many such pairs."""
        p, m = np.asarray(self.predicted), np.asarray(self.measured)
        first, second = np.triu_indices(len(p), 1)
        differ = m[first] != m[second]
        tied = np.abs(p[first] - p[second]) <= TIE * np.maximum(p[first], p[second])
        right = (p[first] < p[second]) == (m[first] < m[second])
        return float(np.where(tied, 0.5, right)[differ].sum()), int(differ.sum())

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, ties at their mean rank; `None` where either side does not vary."""
        from scipy.stats import spearmanr

        if len(set(self.predicted)) < 2 or len(set(self.measured)) < 2:
            return None
        return float(spearmanr(self.predicted, self.measured).statistic)


@dataclass(frozen=True, slots=True)
class RegretSummary:
    """How good the choices of a prediction are.

    Attributes:
        choices: Groups of alternatives.
        best_found: Share of groups whose best was picked.
        mean: Mean regret.
        worst: Largest regret.
        random: Mean regret of picking by chance.
        pairwise: Share of pairs in the right order.
        rank_correlation: Mean of Spearman's over the groups.
    """

    choices: int
    best_found: float
    mean: float
    worst: float
    random: float
    pairwise: float
    rank_correlation: float

    def to_dict(self) -> dict[str, float]:
        """Returns plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"best found in {self.best_found:.0%} of {self.choices} choices, regret mean {self.mean:.1%}, worst {self.worst:.1%} "
            f"(by chance {self.random:.1%}), pairs in order {self.pairwise:.0%}, rank correlation {self.rank_correlation:.2f}"
        )


def regret(choices: Sequence[Choice]) -> RegretSummary | None:
    """Summarises choices; `None` if there are none."""
    if not choices:
        return None
    regrets = [c.regret for c in choices]
    right, pairs = np.sum([c.pairwise for c in choices], axis=0)
    correlations = [r for c in choices if (r := c.rank_correlation) is not None]
    return RegretSummary(
        choices=len(choices),
        best_found=float(np.mean([c.hit for c in choices])),
        mean=float(np.mean(regrets)),
        worst=max(regrets),
        random=float(np.mean([c.random_regret for c in choices])),
        pairwise=float(right / pairs) if pairs else float("nan"),
        rank_correlation=float(np.mean(correlations)) if correlations else float("nan"),
    )


def choices(
    keys: Sequence[Hashable], alternatives: Sequence[Hashable], predicted: Sequence[float], measured: Sequence[float], *, least: int = 3
) -> tuple[Choice, ...]:
    """Groups rows into choices.

    Args:
        keys: What rows of one choice share (model, devices, batch).
        alternatives: What differs; rows that share it too are repeated measurements, of which the mean counts.
        predicted: Cost by prediction.
        measured: Cost as measured.
        least: Alternatives that a choice needs.
    """
    table: dict[Hashable, dict[Hashable, list[tuple[float, float]]]] = {}
    for key, alternative, p, m in zip(keys, alternatives, predicted, measured, strict=True):
        table.setdefault(key, {}).setdefault(alternative, []).append((p, m))
    groups = [[np.mean(rows, axis=0) for rows in group.values()] for group in table.values() if len(group) >= least]
    return tuple(Choice(tuple(float(p) for p, _ in group), tuple(float(m) for _, m in group)) for group in groups)


@dataclass(frozen=True, slots=True)
class Confusion:
    """What fits and what does not, as predicted and as measured.

    Attributes:
        fits_right: Ran, and was said to fit.
        fits_wrong: Ran, but was said not to fit.
        over_right: Ran out of memory, as was said.
        over_wrong: Ran out of memory, but was said to fit.
    """

    fits_right: int
    fits_wrong: int
    over_right: int
    over_wrong: int

    def to_dict(self) -> dict[str, int]:
        """Returns plain data."""
        return asdict(self)

    def __str__(self) -> str:
        ran, over = self.fits_right + self.fits_wrong, self.over_right + self.over_wrong
        return f"{self.fits_right} of {ran} that ran said to fit, {self.over_right} of {over} that ran out of memory said not to fit"


def confusion(said_to_fit: Sequence[bool], ran: Sequence[bool]) -> Confusion:
    """Counts the four cases."""
    cells: Mapping[tuple[bool, bool], int] = {
        (said, did): sum((s, d) == (said, did) for s, d in zip(said_to_fit, ran, strict=True))
        for said in (True, False)
        for did in (True, False)
    }
    return Confusion(cells[True, True], cells[False, True], cells[False, False], cells[True, False])
