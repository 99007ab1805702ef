"""Tables of sweeps and of comparisons, and the reasons under a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simtrain.core.units import format_bytes, format_time
from simtrain.report.text import bullets, part_time, plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from simtrain.planner.robust import Outlook
    from simtrain.planner.why import Comparison, Why, Worth


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per point: what was given, then speed and memory.

    Args:
        rows: As `simtrain.planner.sweep.sweep_rows` returned them.
    """
    given = [name for name in rows[0] if name not in ("point", "strategy", "error") and not _is_result(name)] if rows else []
    columns = ("", *given, "step time", "samples/s", "MFU", "memory", "bound by")
    table = plain_table("", *columns, numeric=("", "step time", "samples/s", "MFU", "memory"))
    for i, row in enumerate(rows, start=1):
        cells = [str(i), *(str(row[name]) for name in given)]
        if row["error"]:
            table.add_row(*cells, "-", "-", "-", "-", str(row["error"]))
            continue
        memory = row["memory"]
        over = "" if row["fits"] else " (too much)"
        cells += [format_time(row["step_time_s"]), f"{row['samples_per_s']:.4g}", f"{row['mfu']:.1%}"]
        table.add_row(*cells, format_bytes(memory["device_bytes"]) + over, row["bound_by"])
    return table


def _is_result(name: str) -> bool:
    from simtrain.core.result import Result

    return name in Result.__dataclass_fields__


def comparison_table(found: Comparison) -> RenderableType:
    """The parts of two steps and the kinds of their memory beside each other, largest difference first."""
    from rich.console import Group

    time = plain_table("Time on the slowest rank", "part", "A", "B", "B - A", numeric=("A", "B", "B - A"))
    for name, change in found.time_s.items():
        longest_s = max(found.a.step_time_s, found.b.step_time_s)
        parts = [part_time(r.breakdown_s.get(name, 0.0), longest_s) for r in (found.a, found.b)]
        time.add_row(name, *parts, _signed(change, format_time))
    memory = plain_table("Memory at its peak", "kind", "A", "B", "B - A", numeric=("A", "B", "B - A"))
    for name, change in found.memory_bytes.items():
        before, after = (r.memory.by_kind_bytes.get(name, 0.0) for r in (found.a, found.b))
        memory.add_row(name, format_bytes(before), format_bytes(after), _signed(change, format_bytes))
    return Group("\n".join(str(found).splitlines()[:3]), "", time, memory)


def _signed(value: float, written: Any) -> str:
    return f"{'-' if value < 0 else '+'}{written(abs(value))}" if value else "0"


def why_table(found: Why) -> RenderableType:
    """What bounds a strategy, what more of a resource and what one other choice is worth."""
    from rich.console import Group

    table = plain_table("What would change it", "", "throughput", "step time", "", numeric=("throughput", "step time"))
    for worth in found.resources:
        table.add_row(worth.change, *_worth(worth))
    table.add_section()
    for worth in found.knobs:
        table.add_row(worth.change, *_worth(worth))
    return Group(f"The best is {found.bound_by}.", "", table)


def _worth(worth: Worth) -> tuple[str, str, str]:
    return f"{worth.gain:+.1%}", format_time(worth.step_time_s), "" if worth.fits else "does not fit"


def changes_table(found: Sequence[Worth]) -> RenderableType:
    """The smallest changes with which a strategy fits."""
    if not found:
        return "No one or two other choices make it fit on these devices: see simtrain plan."
    table = plain_table("Smallest changes with which it fits", "change", "throughput", "step time", numeric=("throughput", "step time"))
    for worth in found:
        table.add_row(worth.change, f"{worth.gain:+.1%}", format_time(worth.step_time_s))
    return table


def outlook_table(found: Sequence[Outlook]) -> Table:
    """Finalists under errors of the model."""
    columns = ("best guess", "expected", "worst decile", "fastest in", "out of memory in")
    table = plain_table("Finalists under errors of the model", "strategy", *columns, numeric=columns)
    for o in found:
        times = (format_time(t) for t in (o.step_time_s, o.expected_s, o.worst_decile_s))
        table.add_row(o.strategy.replace(",", ", "), *times, f"{o.chance_best:.0%}", f"{o.chance_out:.1%}")
    return table


def advice_list(lines: Sequence[str]) -> RenderableType:
    """What would make a model fit."""
    return bullets("What would make it fit", lines)
