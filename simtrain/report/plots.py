"""Plots of a prediction. Each draws on the Axes it is given, or on new ones, and returns them; nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.result import MemoryKind, MemoryTimeline, Result
from simtrain.core.units import format_bytes, format_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GIB = 2.0**30

MEMORY_COLOURS: dict[MemoryKind, str] = {
    MemoryKind.PARAMETER: "#1f4e79",
    MemoryKind.OPTIMIZER: "#4a86b8",
    MemoryKind.GRADIENT: "#9cc3e0",
    MemoryKind.COMMUNICATION: "#6a4c93",
    MemoryKind.ACTIVATION: "#e07b39",
    MemoryKind.RECOMPUTED: "#f2b872",
    MemoryKind.LOGITS: "#b23a48",
    MemoryKind.TRANSIENT: "#5f9e6e",
    MemoryKind.CAST: "#a3c585",
    MemoryKind.WORKSPACE: "#8c8c8c",
    MemoryKind.INPUT: "#c9a227",
    MemoryKind.ROUNDING: "#d0d0d0",
}
"""Colour of each kind of memory, in stacking order: what stays at the bottom, what comes and goes above."""

PART_COLOURS = {
    "compute": "#4a86b8",
    "recompute": "#f2b872",
    "optimizer": "#5f9e6e",
    "communication": "#b23a48",
    "offload": "#2a9d8f",
    "host": "#6a4c93",
    "wait": "#c8c8c8",
}
"""Colour of each part of the breakdown."""

_OTHER_COLOURS = ("#8c564b", "#c9a227", "#17becf", "#e377c2")
_LABEL_SHARE = 0.06  # a part that takes less of the longest bar gets no number of its own
_GAP_SHARE, _GAP_FACTOR = 0.05, 50.0  # a gap this long against the whole, and against the median distance of two moments
_ROOM_ABOVE = 4.0  # a capacity beyond so many times the need is named instead of drawn to scale


def new_axes(width_inch: float, height_inch: float) -> Axes:
    """Returns the Axes of a new pyplot figure (pyplot falls back to a file backend where there is no display)."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width_inch, height_inch), layout="constrained")[1]


def plot_memory(result: Result, ax: Axes | None = None) -> Axes:
    """Draws allocated memory over the step as areas stacked by kind, with the peak marked and the device's capacity as a line.

    Args:
        result: From a reader that keeps the memory timeline.
        ax: Where to draw; new Axes by default.

    Raises:
        InputError: The result holds no timeline.
    """
    memory = result.memory
    if memory.timeline is None:
        raise InputError(f"the reader {result.reader!r} keeps no memory timeline to plot: use schedule or simulate")
    ax = new_axes(10, 5) if ax is None else ax
    x = _stack_memory(ax, memory.timeline)
    _mark_gap(ax, memory.timeline, x)
    peak = int(np.argmax(memory.timeline.total_bytes))
    ax.plot([x[peak]], [memory.timeline.total_bytes[peak] / _GIB], "o", color="black", markersize=5, zorder=5)
    _annotate_peak(ax, x, peak, f"peak {format_bytes(memory.allocated_bytes)}\n{memory.peak_moment}", memory.allocated_bytes / _GIB)
    _memory_lines(ax, result)
    ax.set_ylabel("memory (GiB)")
    ax.set_title(f"{result.workload} on {result.cluster}: memory ({memory.rank_class})\n{result.strategy}", fontsize=10)
    handles, labels = ax.get_legend_handles_labels()  # reversed: from top to bottom as the areas are stacked, lines first
    ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    return ax


def _stack_memory(ax: Axes, timeline: MemoryTimeline) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    kinds = list(MemoryKind)
    shown = [k for k in MEMORY_COLOURS if timeline.bytes_by_kind[:, kinds.index(k)].any()]
    steps = np.diff(timeline.time_s)
    if len(steps) > 1 and np.ptp(steps) <= 1e-9 * abs(steps.mean()):
        x = np.arange(len(timeline.moments), dtype=np.float64)
        ax.set_xlabel("moment of the step, in the order the host issues operations")
    else:
        x = np.maximum.accumulate(timeline.time_s) * 1e3
        ax.set_xlabel("time in the step (ms)")
    layers = [timeline.bytes_by_kind[:, kinds.index(k)] / _GIB for k in shown]
    ax.stackplot(x, *layers, step="post", labels=[k.value for k in shown], colors=[MEMORY_COLOURS[k] for k in shown], linewidth=0)
    ax.set_xlim(float(x[0]), float(x[-1]) if x[-1] > x[0] else float(x[0]) + 1)
    return x


def _mark_gap(ax: Axes, timeline: MemoryTimeline, x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    """Hatches a long time without moments: the ledger replays equal micro-batches once, the last one it names stands for the rest."""
    from matplotlib.patches import Rectangle

    steps = np.diff(x)
    if len(steps) < 2 or steps.max() < _GAP_SHARE * (x[-1] - x[0]) or steps.max() < _GAP_FACTOR * np.median(steps):
        return
    before = int(steps.argmax())
    start, width, height = float(x[before]), float(x[before + 1] - x[before]), float(timeline.total_bytes.max()) / _GIB
    ax.add_patch(Rectangle((start, 0), width, height, facecolor=(1, 1, 1, 0.7), hatch="//", edgecolor="#dddddd", linewidth=0, zorder=3))
    micro_batch = timeline.moments[before].partition("/")[0]
    text = f"repeats micro-batch {micro_batch}" if micro_batch.isdecimal() else "not stated"
    ax.text(
        start + width / 2,
        height / 2,
        text,
        ha="center",
        va="center",
        fontsize=8,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"},
        zorder=4,
    )


def _annotate_peak(ax: Axes, x: np.ndarray[tuple[int], np.dtype[np.float64]], peak: int, text: str, height_gib: float) -> None:
    on_the_right = x[peak] > (x[0] + x[-1]) / 2
    ax.annotate(
        text,
        xy=(float(x[peak]), height_gib),
        xytext=(-12 if on_the_right else 12, 16),
        textcoords="offset points",
        ha="right" if on_the_right else "left",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.6},
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.95},
        zorder=6,
    )


def _memory_lines(ax: Axes, result: Result) -> None:
    memory = result.memory
    need, capacity = memory.device_bytes / _GIB, memory.capacity_bytes / _GIB
    ax.axhline(need, color="black", linewidth=0.9, linestyle=":", label=f"on the device {format_bytes(memory.device_bytes)}")
    if capacity <= _ROOM_ABOVE * need:
        ax.axhline(capacity, color="#c00000", linewidth=1.5, label=f"capacity {format_bytes(memory.capacity_bytes)}")
        ax.set_ylim(0, max(need, capacity) * 1.12)
    else:
        label = f"capacity {format_bytes(memory.capacity_bytes)} (above the scale)"
        ax.axhline(capacity, color="#c00000", linewidth=1.5, label=label)
        ax.set_ylim(0, need * 1.4)


def plot_breakdown(results: Iterable[Result] | Result, ax: Axes | None = None) -> Axes:
    """Draws what the step time consists of as one stacked bar per result, in milliseconds.

    Args:
        results: One or several.
        ax: Where to draw; new Axes by default.

    Raises:
        InputError: No results.
    """
    rows = [results] if isinstance(results, Result) else list(results)
    if not rows:
        raise InputError("plot_breakdown needs at least one result")
    ax = new_axes(10, 1.6 + 0.5 * len(rows)) if ax is None else ax
    present = dict.fromkeys(part for r in rows for part, time_s in r.breakdown_s.items() if time_s > 0)
    others = [p for p in present if p not in PART_COLOURS]
    parts = [p for p in PART_COLOURS if p in present] + others
    colours = PART_COLOURS | dict(zip(others, _OTHER_COLOURS * len(parts), strict=False))
    longest_ms = max(r.step_time_s for r in rows) * 1e3
    left = np.zeros(len(rows))
    for part in parts:
        width = np.array([r.breakdown_s.get(part, 0.0) * 1e3 for r in rows])
        bars = ax.barh(range(len(rows)), width, left=left, color=colours[part], label=part, edgecolor="white", linewidth=0.5)
        texts = [f"{w:.3g}" if w >= _LABEL_SHARE * longest_ms else "" for w in width]
        ax.bar_label(bars, texts, label_type="center", fontsize=8)
        left += width
    for i, r in enumerate(rows):
        ax.text(left[i], i, f" {format_time(r.step_time_s)}, MFU {r.mfu:.0%}", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), _row_labels(rows), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, longest_ms * 1.22)
    ax.set_xlabel("step time on the slowest rank (ms)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(len(parts), 1), fontsize=8, frameon=False)
    return ax


def _row_labels(rows: list[Result]) -> list[str]:
    """Names each bar by what differs between the results; the strategy always, one choice group per line."""
    import textwrap

    varied = [name for name in ("workload", "cluster", "runtime", "reader") if len({getattr(r, name) for r in rows}) > 1]
    labels = []
    for r in rows:
        words = ", ".join([*(str(getattr(r, name)) for name in varied), r.strategy.replace(",", ", ")])
        labels.append("\n".join(textwrap.wrap(words, 42)))
    return labels
