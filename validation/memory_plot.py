"""Time against memory of every way to recompute, as measured, with what was predicted beside it."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from validation.memory import WHOLE, MemoryReport, MemoryRow
from validation.memory_worker import PARTITIONER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = {
    "none": ("o", "#5f9e6e"),
    "every:2": ("s", "#c9a227"),
    "sqrt": ("D", "#b23a48"),
    "full": ("^", "#6a4c93"),
    "selective": ("v", "#0f766e"),
    "partitioner": ("P", "#d97706"),
}
_OPTIMAL = "#1f4e79"


def plot_memory_pairs(report: MemoryReport) -> Figure:
    """Draws one panel per model: optimal choices as a line, rules and partitioner as marks, predictions as hollow ones beside them.

    Times are over that of the same model without recomputation, measured over measured and predicted over predicted; those of PyTorch's
    partitioner, whose traced operators are slower by themselves, over its own with nothing recomputed, where that was measured. Tensorized
    weights are another model and left out.

    Args:
        report: Of `simtrain validate memory`.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    models = [(step, list(rows)) for step, rows in groupby(report.rows, key=lambda r: r.step)]
    columns = min(len(models), 3)
    lines = -(-len(models) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines + 0.9), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, (step, rows) in zip(places, models, strict=False):
        _panel(ax, step, [r for r in rows if not r.error and not r.tensorize])
    for ax in places[len(models) :]:
        ax.axis("off")
    labelled = {label: line for ax in places for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        labelled.values(),
        labelled.keys(),
        loc="outside lower center",
        ncols=min(4, 2 * columns),
        frameon=False,
        title="hollow: predicted; partitioner over its own plain step",
    )
    return figure


def _panel(ax: Axes, step: str, rows: list[MemoryRow]) -> None:
    plain = next(r for r in rows if r.name == "none")
    whole = next((r for r in rows if r.name == WHOLE), plain)
    optimal = sorted({r.way: r for r in rows if r.name.startswith("optimal")}.values(), key=lambda r: r.peak_bytes)
    line = [*optimal, plain]
    ax.plot(_peaks(line), [r.step_time_s / plain.step_time_s for r in line], "o-", color=_OPTIMAL, markersize=4, label="optimal, measured")
    predicted = [r.predicted_time_s / plain.predicted_time_s for r in line]
    ax.plot([r.predicted_bytes / 2**20 for r in line], predicted, "o--", color=_OPTIMAL, markerfacecolor="none", label="optimal, predicted")
    for r in rows:
        name = "partitioner" if r.name.startswith(PARTITIONER) and r.name != WHOLE else r.name
        if name not in _MARKS:
            continue
        mark, colour = _MARKS[name]
        label, own = ("PyTorch's partitioner", whole) if name == "partitioner" else (name, plain)
        ax.plot(r.peak_bytes / 2**20, r.step_time_s / own.step_time_s, mark, color=colour, markersize=8, linestyle="none", label=label)
        if r.predicted_bytes:
            place = r.predicted_bytes / 2**20, r.predicted_time_s / plain.predicted_time_s
            ax.plot(*place, mark, color=colour, markersize=8, markerfacecolor="none", linestyle="none")
    ax.set_title(step, fontsize=10)
    ax.set_xlabel("peak memory (MiB)")
    ax.set_ylabel("step time over no recomputation")
    ax.grid(alpha=0.25)


def _peaks(rows: list[MemoryRow]) -> list[float]:
    return [r.peak_bytes / 2**20 for r in rows]


__all__ = ["plot_memory_pairs"]
