"""Summaries of errors, beside those of a null model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Relative errors of predictions (predicted / measured - 1).

    Attributes:
        count: How many.
        mean: Mean of absolute values.
        median: Median of absolute values.
        p90: 90th percentile of absolute values.
        worst: Largest absolute value.
        bias: Mean with sign.
    """

    count: int
    mean: float
    median: float
    p90: float
    worst: float
    bias: float

    def to_dict(self) -> dict[str, float]:
        """Returns plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"mean {self.mean:.2%}, median {self.median:.2%}, p90 {self.p90:.2%}, worst {self.worst:.2%}, "
            f"bias {self.bias:+.2%} (n={self.count})"
        )


def summarise(errors: Sequence[float]) -> ErrorSummary:
    """Summarises signed relative errors."""
    values = np.asarray(errors, dtype=np.float64)
    size = np.abs(values)
    return ErrorSummary(
        count=len(values),
        mean=float(size.mean()),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        worst=float(size.max()),
        bias=float(values.mean()),
    )


def skill(errors: ErrorSummary, null: ErrorSummary) -> float:
    """Returns 1 - error / null error by mean: 0 is no better than the null model, 1 is perfect."""
    return 1 - errors.mean / null.mean if null.mean else 0.0


def percent(summary: ErrorSummary | None, name: str) -> str:
    """One figure of a summary as text, the bias with its sign; "-" where there is none."""
    if summary is None:
        return "-"
    value: float = getattr(summary, name)
    return f"{value:+.1%}" if name == "bias" else f"{value:.1%}"
