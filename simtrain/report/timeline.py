"""The timeline of a step: what each stream of each rank class does when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simtrain.core.errors import InputError
from simtrain.core.result import Result, TraceEvent
from simtrain.core.units import format_time
from simtrain.report.plots import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CATEGORY_COLOURS: dict[str, str] = {
    "host": "#6a4c93",
    "forward": "#4a86b8",
    "recompute": "#f2b872",
    "backward": "#1f6f5c",
    "gradient_copy": "#c9a227",
    "collective": "#b23a48",
    "optimizer": "#7a7a7a",
    "offload": "#2a9d8f",
}
"""Colour of each category of work."""

MAX_RANK_CLASSES = 8
"""How many rank classes a timeline shows; of more, the slowest and the fastest."""

OTHER_COLOUR = "#d0d0d0"
GAP_SHARE = 0.002  # of the time shown: shorter gaps inside a micro-batch are not worth a hole in the bar
_LABEL_SHARE = 0.025  # narrower bars carry no number
_BAR_HEIGHT = 0.8
_DARK = {"host", "forward", "backward", "collective", "optimizer"}


@dataclass(frozen=True, slots=True)
class Bar:
    """Consecutive work of one category and micro-batch on one stream."""

    category: str
    micro_batch: int
    start_s: float
    end_s: float


def plot_timeline(result: Result, ax: Axes | None = None) -> Axes:
    """Draws one step as a Gantt chart: a row per rank class and stream, coloured by category.

    Work of the same category and micro-batch that follows without a visible gap is one bar, numbered with its micro-batch; every second
    micro-batch is a little lighter.

    Args:
        result: From `schedule` or `simulate`.
        ax: Where to draw; new Axes by default.

    Raises:
        InputError: The result holds no events.
    """
    if not result.events:
        raise InputError(f"the reader {result.reader!r} keeps no events to plot: use schedule or simulate")
    rows, hidden = timeline_rows(result)
    first_s = min(e.start_s for e in result.events)
    span_s = max(e.start_s + e.duration_s for e in result.events) - first_s
    ax = new_axes(12, 1.5 + 0.55 * len(rows)) if ax is None else ax
    for y, events in enumerate(rows.values()):
        _draw_row(ax, y, merged(events, span_s * GAP_SHARE), span_s)
    _label_axes(ax, result, list(rows), hidden)
    ax.set_xlim(first_s * 1e3, (first_s + max(span_s, 1e-9)) * 1e3)
    return ax


def timeline_rows(result: Result) -> tuple[dict[tuple[str, str], list[TraceEvent]], int]:
    """Groups events by rank class and stream; of many classes only those that compute longest and shortest are kept.

    Returns:
        The rows in order of appearance, and how many rank classes are left out.
    """
    rows: dict[tuple[str, str], list[TraceEvent]] = defaultdict(list)
    busy_s: dict[str, float] = {}
    for event in result.events:
        rows[event.rank_class, event.stream].append(event)
        if event.stream == "compute":
            busy_s[event.rank_class] = busy_s.get(event.rank_class, 0.0) + event.duration_s
    by_busy = sorted(busy_s, key=lambda name: busy_s[name])
    hidden = set(by_busy[MAX_RANK_CLASSES // 2 : len(by_busy) - MAX_RANK_CLASSES // 2])
    return {key: events for key, events in rows.items() if key[0] not in hidden}, len(hidden)


def merged(events: Sequence[TraceEvent], gap_s: float) -> list[Bar]:
    """Joins work of the same category and micro-batch that follows without a gap longer than `gap_s`."""
    bars: list[Bar] = []
    for e in sorted(events, key=lambda e: e.start_s):
        end_s = e.start_s + e.duration_s
        last = bars[-1] if bars else None
        if last and (last.category, last.micro_batch) == (e.category, e.micro_batch) and e.start_s - last.end_s <= gap_s:
            bars[-1] = Bar(e.category, e.micro_batch, last.start_s, max(last.end_s, end_s))
        else:
            bars.append(Bar(e.category, e.micro_batch, e.start_s, end_s))
    return bars


def _draw_row(ax: Axes, y: int, bars: Sequence[Bar], span_s: float) -> None:
    groups: dict[tuple[str, bool], list[Bar]] = defaultdict(list)
    for bar in bars:
        groups[bar.category, bar.micro_batch > 0 and bar.micro_batch % 2 == 1].append(bar)
    for (category, odd), group in groups.items():
        ax.broken_barh(
            [(b.start_s * 1e3, (b.end_s - b.start_s) * 1e3) for b in group],
            (y - _BAR_HEIGHT / 2, _BAR_HEIGHT),
            facecolors=CATEGORY_COLOURS.get(category, OTHER_COLOUR),
            alpha=0.72 if odd else 1.0,
            linewidth=0,
        )
    for bar in bars:
        if bar.micro_batch >= 0 and bar.end_s - bar.start_s >= _LABEL_SHARE * span_s:
            colour = "white" if bar.category in _DARK else "black"
            middle_ms = (bar.start_s + bar.end_s) / 2 * 1e3
            ax.text(middle_ms, y, str(bar.micro_batch), ha="center", va="center", fontsize=8, color=colour, clip_on=True)


def _label_axes(ax: Axes, result: Result, rows: list[tuple[str, str]], hidden: int) -> None:
    from matplotlib.patches import Patch

    several = len({rank_class for rank_class, _ in rows}) > 1
    ax.set_yticks(range(len(rows)), [f"{rank_class}: {stream}" if several else stream for rank_class, stream in rows], fontsize=9)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    omitted = f"; {hidden} rank classes between the slowest and the fastest are left out" if hidden else ""
    ax.set_xlabel(f"time (ms); numbers are micro-batches{omitted}")
    ax.set_title(f"{result.workload} on {result.cluster}: one step of {format_time(result.step_time_s)}\n{result.strategy}", fontsize=10)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    seen = {e.category for e in result.events}
    handles = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in CATEGORY_COLOURS.items() if name in seen]
    handles += [Patch(color=OTHER_COLOUR, label=name) for name in sorted(seen - set(CATEGORY_COLOURS))]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
