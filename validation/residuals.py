"""Where the errors of a source lie: rows grouped by one property of their layout after another.

A group that holds more of the absolute error than of the rows points at what its rows share: collectives between nodes, bubbles, hosts that
issue small kernels. Properties overlap, so a table finds suspects, it does not convict.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from validation.report import LayoutComparison, LayoutReport


@dataclass(frozen=True, slots=True)
class ResidualGroup:
    """Rows of a source that share a property.

    Attributes:
        by: The property.
        group: What they share of it.
        rows: How many.
        row_share: Of all timed rows.
        bias: Median relative error of the step time, with sign.
        error_share: Share of the sum of absolute errors.
    """

    by: str
    group: str
    rows: int
    row_share: float
    bias: float
    error_share: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def residuals(report: LayoutReport) -> tuple[ResidualGroup, ...]:
    """Groups the errors of step times by every property in which rows differ."""
    rows = report.timed
    total = sum(abs(r.error or 0.0) for r in rows)
    found: list[ResidualGroup] = []
    for by, (names, place) in _properties(report).items():
        groups: dict[int, list[float]] = {}
        for r in rows:
            groups.setdefault(place(r), []).append(r.error or 0.0)
        if len(groups) < 2:
            continue
        for at, errors in sorted(groups.items()):
            size = sum(map(abs, errors))
            share = size / total if total else 0.0
            found.append(ResidualGroup(by, names[at], len(errors), len(errors) / len(rows), median(errors), share))
    return tuple(found)


Place = Callable[["LayoutComparison"], int]


def _properties(report: LayoutReport) -> dict[str, tuple[Sequence[str], Place]]:
    """Names of the groups of each property, and which of them a row belongs to."""
    machines = report.dataset.machines

    def span(degree: int, per_node: int) -> int:
        return 0 if degree == 1 else 1 if degree <= per_node else 2

    def tensor(r: LayoutComparison) -> int:
        return span(r.row.tensor, machines[r.row.machine].per_node)

    def replicas(r: LayoutComparison) -> int:
        ranks = r.row.tensor * r.row.context * r.row.data
        return 0 if r.row.data == 1 else span(ranks, machines[r.row.machine].per_node)

    spans = ("not used", "within a node", "over nodes")
    return {
        "tensor parallelism": (spans, tensor),
        "replicas of a stage": (spans, replicas),
        "pipeline stages": _bands((2, 5, 9), lambda r: r.row.pipeline),
        "micro-batches per stage": _bands((2, 5, 17), lambda r: r.row.accumulation // r.row.pipeline),
        "samples of a micro-batch": _bands((2, 4, 9), lambda r: r.row.micro_batch),
        **{f"predicted share of {name}": _shares(name) for name in ("bubble", "communication", "host")},
    }


def _bands(starts: Sequence[int], value: Callable[[LayoutComparison], int]) -> tuple[Sequence[str], Place]:
    """Ranges of whole numbers that begin at 1 and at each start."""
    edges = (1, *starts)
    ends = [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in zip(edges, starts, strict=False)]
    return (f"below {starts[0]}" if starts[0] > 2 else "1", *ends[1:], f"{starts[-1]} or more"), lambda r: bisect_right(starts, value(r))


def _shares(name: str, edges: Sequence[float] = (0.05, 0.15)) -> tuple[Sequence[str], Place]:
    """Shares of the predicted step that went into something."""
    names = (f"below {edges[0]:.0%}", f"{edges[0]:.0%} to {edges[1]:.0%}", f"{edges[1]:.0%} or more")
    return names, lambda r: bisect_right(edges, r.prediction.shares.get(name, 0.0))


__all__ = ["ResidualGroup", "residuals"]
