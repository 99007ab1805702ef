"""Tables of a page: cells with what they are sorted by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simtrain.core.result import Result
from simtrain.core.units import format_bytes, format_time
from simtrain.planner.evidence import Nearby
from simtrain.planner.found import Failure, Plan
from simtrain.planner.robust import Outlook
from simtrain.report.page_words import number
from simtrain.report.tables import excess, smallest_change
from simtrain.report.text import part_time

if TYPE_CHECKING:
    from simtrain.planner.why import Comparison, Worth

MOST_ROWS = 300
"""Alternatives that a page lists."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is shown, and the number it is sorted by (`None` for text)."""

    text: str
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table that sorts by a click on its columns' names."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    key: str

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return any(row[column].value is not None for row in self.rows)


def alternatives(results: Sequence[Result]) -> Table:
    """The strategies that fit, best first."""
    several = len({r.runtime for r in results}) > 1
    priced = any(r.cost_usd for r in results)
    columns = ("#", "strategy", *(("runtime",) if several else ()), "step time", "samples/s", "MFU", "memory", "J/sample")
    shared = in_common(results)
    rows = []
    for i, r in enumerate(results[:MOST_ROWS], start=1):
        own = [part for part in r.strategy.split(",") if part not in shared]
        row = [Cell(str(i), i), Cell(", ".join(own) or "nothing else")]
        row += [Cell(r.runtime)] if several else []
        row += [Cell(format_time(r.step_time_s), r.step_time_s), Cell(number(r.samples_per_s), r.samples_per_s)]
        row += [Cell(f"{r.mfu:.1%}", r.mfu), Cell(format_bytes(r.memory.device_bytes), r.memory.device_bytes)]
        row += [Cell(number(r.energy_j / r.global_batch), r.energy_j / r.global_batch)]
        if priced:
            dollars = r.cost_usd / r.global_batch * 1000
            row.append(Cell(number(dollars), dollars))
        rows.append((*row, Cell(r.bound_by)))
    return Table((*columns, *(("USD/k samples",) if priced else ()), "bound by"), tuple(rows), "alternatives")


def in_common(results: Sequence[Result]) -> list[str]:
    """Choices that all strategies share, as text; nothing of a single one."""
    parts = [set(r.strategy.split(",")) for r in results]
    return [p for p in results[0].strategy.split(",") if all(p in of_it for of_it in parts)] if len(results) > 1 else []


def failures(failed: Sequence[Failure]) -> Table:
    """Why the others fail, in groups, the most frequent first."""
    groups: dict[str, list[Failure]] = defaultdict(list)
    for f in failed:
        groups[f"out of memory, mostly {f.term}" if f.over_bytes > 0 else f.reason].append(f)
    rows = []
    for reason, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        closest = min(group, key=lambda f: (f.over_bytes, f.times_limit))
        over = Cell(excess(closest), closest.over_bytes or closest.times_limit)
        rows.append((Cell(f"{len(group):,}", len(group)), Cell(reason), over, _spaced(closest.strategy), Cell(smallest_change(closest))))
    return Table(("strategies", "why", "over by, at least", "closest to fitting", "would fit with"), tuple(rows), "failures")


def worths(found: Sequence[Worth], what: str) -> Table:
    """What changes are worth."""
    rows = tuple(
        (
            Cell(w.change.replace(",", ", ")),
            Cell(f"{w.gain:+.1%}", w.gain),
            Cell(format_time(w.step_time_s), w.step_time_s),
            Cell("yes" if w.fits else "no"),
        )
        for w in found
    )
    return Table((what, "throughput", "step time", "fits"), rows, "worths")


def evidence(found: Sequence[Nearby]) -> Table:
    """The nearest measured runs beside predictions of them."""
    rows = []
    for n in found:
        error = Cell("refused") if n.error is None else Cell(f"{n.error:+.1%}", n.error)
        predicted = Cell("-") if n.predicted_s is None else Cell(format_time(n.predicted_s), n.predicted_s)
        memory = Cell("not printed") if n.memory_error is None else Cell(f"{n.memory_error:+.1%}", n.memory_error)
        measured = Cell(format_time(n.measured_s), n.measured_s)
        apart = Cell(f"{n.distance:.1f}", n.distance)
        differs = Cell("; ".join(n.differences) or "nothing named")
        rows.append((Cell(n.name), apart, differs, measured, predicted, error, memory))
    columns = ("measured run", "distance", "differs in", "measured", "predicted", "error", "memory error")
    return Table(columns, tuple(rows), "evidence")


def outlooks(found: Sequence[Outlook]) -> Table:
    """Finalists under errors of the model."""
    rows = []
    for o in found:
        times = [Cell(format_time(t), t) for t in (o.step_time_s, o.expected_s, o.worst_decile_s)]
        rows.append((_spaced(o.strategy), *times, Cell(f"{o.chance_best:.0%}", o.chance_best), Cell(f"{o.chance_out:.1%}", o.chance_out)))
    return Table(("finalist", "best guess", "expected", "worst decile", "fastest in", "out of memory in"), tuple(rows), "outlooks")


def differences(found: Comparison) -> tuple[Table, Table]:
    """Time by part and memory by kind of two results."""
    a, b = found.a, found.b
    longest_s = max(a.step_time_s, b.step_time_s)
    time = [
        (Cell(name), *_pair(a.breakdown_s.get(name, 0.0), b.breakdown_s.get(name, 0.0), change, lambda t: part_time(t, longest_s)))
        for name, change in found.time_s.items()
    ]
    kinds = (a.memory.by_kind_bytes, b.memory.by_kind_bytes)
    memory = [
        (Cell(name), *_pair(kinds[0].get(name, 0.0), kinds[1].get(name, 0.0), change, format_bytes))
        for name, change in found.memory_bytes.items()
    ]
    return Table(("part", "A", "B", "B - A"), tuple(time), "time"), Table(("kind", "A", "B", "B - A"), tuple(memory), "memory")


def _pair(a: float, b: float, change: float, written: Callable[[float], str]) -> tuple[Cell, Cell, Cell]:
    sign = "+" if change > 0 else "-"
    return Cell(written(a), a), Cell(written(b), b), Cell(f"{sign}{written(abs(change))}" if change else "0", change)


def _spaced(strategy: str) -> Cell:
    return Cell(strategy.replace(",", ", "))


def front(plan: Plan) -> Sequence[Result]:
    """What no other beats in all objectives; with one objective, in speed and memory."""
    if len(plan.objectives) > 1:
        return plan.front
    kept: list[Result] = []
    for r in sorted(plan.ranked, key=lambda r: (-r.samples_per_s, r.memory.device_bytes)):
        if not kept or r.memory.device_bytes < kept[-1].memory.device_bytes:
            kept.append(r)
    return kept
