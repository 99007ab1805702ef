"""Turning tables into text, and the small formats that several tables share."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from simtrain.core.units import format_bytes, format_time

ROUND_OFF = 1e-9  # of the step

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from simtrain.core.result import MemoryReport


def render(renderable: RenderableType, width: int = 120) -> str:
    """Returns a table as plain text without colours.

    Args:
        renderable: What one of the `..._table` functions returned.
        width: In characters.
    """
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def plain_table(title: str, *columns: str, numeric: Iterable[str] = ()) -> Table:
    """Returns an empty table in the house style: no frame, right-aligned `numeric` columns."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    right = set(numeric)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def bullets(title: str, lines: Iterable[str]) -> RenderableType:
    """Returns a titled list; nothing at all if there are no lines."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row("-", escape(line))
    if not grid.rows:
        return ""
    return _titled(title, grid)


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Returns a two-column grid of names and values."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, escape(value))
    return grid


def share(part: float, whole: float) -> str:
    """Returns a percentage, or a dash where there is nothing to divide by."""
    return f"{part / whole:.1%}" if whole else "-"


def part_time(time_s: float, step_time_s: float) -> str:
    """Returns a part of a step; what comes from adding and subtracting times is nothing."""
    return format_time(time_s if abs(time_s) > ROUND_OFF * step_time_s else 0.0)


def memory_verdict(memory: MemoryReport) -> str:
    """Says how much is left, or by how much it does not fit: the device, or what was moved its host."""
    over_bytes = memory.over_bytes
    if over_bytes <= 0 and not memory.fits_host:
        return "DOES NOT FIT the host, see below"
    return f"DOES NOT FIT, over by {format_bytes(over_bytes)}" if over_bytes > 0 else f"fits, {format_bytes(-over_bytes)} left"


def _titled(title: str, body: RenderableType) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    return Group(Text(title, style="bold"), body, "")
