"""Published collectives against predictions, held out by group: the rate that the catalog took from a group's rows is not used on them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np

from simtrain.core import catalog
from simtrain.core.hardware import Cluster, Node
from simtrain.core.workload import Collective
from simtrain.cost.collectives import CollectiveCost, collective
from simtrain.cost.fabric import Fabric
from validation.errors import ErrorSummary, skill, summarise

LARGE_BYTES = 64 * 2**20
"""From here on bandwidth decides, below it latency."""


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """One measured collective.

    Attributes:
        group: Whose machine.
        kind: What was done.
        algorithm: As the source names it; "nccl" where it names none.
        devices: How many ranks.
        size_bytes: As `Collective` defines it.
        time_s: Measured, or from the printed bus bandwidth.
        line: In the source's file.
    """

    group: str
    kind: Collective
    algorithm: str
    devices: int
    size_bytes: float
    time_s: float
    line: int


@dataclass(frozen=True, slots=True)
class CollectiveComparison:
    """One row, predicted.

    Attributes:
        row: As published.
        held_out_s: Predicted with the rate share of another kind of link.
        catalog_s: Predicted with the catalog as it is (its rate shares come from the largest messages of these groups).
        null_s: By one bus bandwidth per group and size class (below `LARGE_BYTES` or not): the median of those very rows.
        algorithm: What was predicted to carry it out.
    """

    row: CollectiveRow
    held_out_s: float
    catalog_s: float
    null_s: float
    algorithm: str


@dataclass(frozen=True, slots=True)
class CollectiveReport:
    """All rows of the set.

    Attributes:
        title: One line.
        sources: Where each group was read.
        notes: What the sources say.
        assumptions: What they do not say.
        variants_looked_at: Ways of predicting these rows that were tried with their errors in sight.
        rows: One comparison each.
    """

    title: str
    sources: tuple[str, ...]
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]
    variants_looked_at: int
    rows: tuple[CollectiveComparison, ...]

    def summaries(self) -> dict[str, dict[str, ErrorSummary]]:
        """Errors of times by group and size: held out, with the catalog's rates, and of the null model."""
        found: dict[str, dict[str, ErrorSummary]] = {}
        for group in dict.fromkeys(c.row.group for c in self.rows):
            for size, large in (("64 MiB and more", True), ("below 64 MiB", False)):
                some = [c for c in self.rows if c.row.group == group and (c.row.size_bytes >= LARGE_BYTES) is large]
                if some:
                    found[f"{group}, {size}"] = {
                        "held out": summarise([c.held_out_s / c.row.time_s - 1 for c in some]),
                        "catalog": summarise([c.catalog_s / c.row.time_s - 1 for c in some]),
                        "null": summarise([c.null_s / c.row.time_s - 1 for c in some]),
                    }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "title": self.title,
            "sources": list(self.sources),
            "notes": list(self.notes),
            "assumptions": list(self.assumptions),
            "variants_looked_at": self.variants_looked_at,
            "summary": {group: {name: s.to_dict() for name, s in each.items()} for group, each in self.summaries().items()},
            "rows": [
                {
                    "group": c.row.group,
                    "collective": str(c.row.kind),
                    "devices": c.row.devices,
                    "size_bytes": c.row.size_bytes,
                    "line": c.row.line,
                    "algorithm": c.algorithm,
                    "measured_s": c.row.time_s,
                    "held_out_s": c.held_out_s,
                    "catalog_s": c.catalog_s,
                    "null_s": c.null_s,
                }
                for c in self.rows
            ],
        }

    def __str__(self) -> str:
        lines = [self.title]
        for group in dict.fromkeys(c.row.group for c in self.rows):
            lines.append(f"{group}\n{'':2}{'row':<46}{'measured':>12}{'held out':>12}{'error':>8}{'catalog':>9}{'null':>9}")
            for c in (c for c in self.rows if c.row.group == group):
                name = f"{c.row.kind} x{c.row.devices} {c.row.size_bytes / 2**20:.6g} MiB ({c.algorithm})"
                errors = [x / c.row.time_s - 1 for x in (c.held_out_s, c.catalog_s, c.null_s)]
                times = f"{c.row.time_s * 1e6:>9.1f} us{c.held_out_s * 1e6:>9.1f} us"
                lines.append(f"  {name:<46}{times}{errors[0]:>+8.1%}{errors[1]:>+9.1%}{errors[2]:>+9.0%}")
        for group, each in self.summaries().items():
            lines += [f"{group}: {name}  {summary}" for name, summary in each.items() if name != "null"]
            lines.append(f"{group}: null, one bus bandwidth  {each['null']}; skill {skill(each['held out'], each['null']):.2f}")
        lines.append(f"variants looked at on these rows: {self.variants_looked_at}")
        return "\n".join([*lines, *(f"source: {s}" for s in self.sources), *(f"assumed: {a}" for a in self.assumptions)])


def compare() -> CollectiveReport:
    """Predicts every row of the shipped set."""
    data = tomllib.loads((files("validation") / "published" / "collectives.toml").read_text())
    rows: list[CollectiveComparison] = []
    for group in data["group"]:
        rows += _compare_group(group)
    return CollectiveReport(
        title=data["title"],
        sources=tuple(dict.fromkeys(f"{g['repository']} at {g['commit']}, {g['file']}" for g in data["group"])),
        notes=tuple(data["notes"]),
        assumptions=tuple(data["assumptions"]),
        variants_looked_at=data["variants_looked_at"],
        rows=tuple(rows),
    )


def _compare_group(group: Mapping[str, Any]) -> list[CollectiveComparison]:
    rows = [_row(group["name"], *row) for row in group["rows"]]
    held_out, as_is = (Fabric(_cluster(group, held_out=flag)) for flag in (True, False))
    rates = {large: [_bus_rate(r) for r in rows if (r.size_bytes >= LARGE_BYTES) is large] for large in (True, False)}
    found = []
    for row in rows:
        costs = [_predict(fabric, row) for fabric in (held_out, as_is)]
        null_s = _factor(row) * row.size_bytes / float(np.median(rates[row.size_bytes >= LARGE_BYTES]))
        found.append(CollectiveComparison(row, costs[0].time_s, costs[1].time_s, null_s, costs[0].algorithm))
    return found


def _row(group: str, kind: str, algorithm: str, devices: int, size_bytes: int, gb_per_s: float, time_us: float, line: int) -> CollectiveRow:
    row = CollectiveRow(group, Collective(kind), algorithm, devices, size_bytes, time_us * 1e-6, line)
    return row if time_us else replace(row, time_s=_factor(row) * size_bytes / (gb_per_s * 1e9))


def _factor(row: CollectiveRow) -> float:
    """Bus bandwidth is this times the buffer over the time (nccl-tests, PERFORMANCE.md)."""
    return (2 if row.kind is Collective.ALL_REDUCE else 1) * (row.devices - 1) / row.devices


def _bus_rate(row: CollectiveRow) -> float:
    return _factor(row) * row.size_bytes / row.time_s


def _predict(fabric: Fabric, row: CollectiveRow) -> CollectiveCost:
    return collective(fabric, row.kind, range(row.devices), row.size_bytes, algorithm=row.algorithm)


def _cluster(group: Mapping[str, Any], *, held_out: bool) -> Cluster:
    device, peer = catalog.device(group["device"]), catalog.link(group["peer_link"])
    if held_out:
        peer = replace(peer, efficiency=catalog.link(group["held_out_efficiency_of"]).efficiency)
    node = Node(
        devices=(device,) * group["devices_per_node"],
        host=None,
        host_link=catalog.link(device.host_link),
        peer_link=peer,
        nic=catalog.link(group["nic"]) if group["nic"] else None,
        nics=group["nics"],
        peer_reduction=group["peer_reduction"],
    )
    return Cluster(group["name"], (node,) * group["nodes"])
