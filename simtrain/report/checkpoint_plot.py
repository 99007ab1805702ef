"""The plot of time against memory under recomputation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simtrain.report.plots import new_axes
from simtrain.step.checkpoint_curve import CheckpointCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RULE_MARKS = {
    "none": ("o", "#5f9e6e"),
    "every:2": ("s", "#c9a227"),
    "sqrt": ("D", "#b23a48"),
    "full": ("^", "#6a4c93"),
    "selective": ("v", "#0f766e"),
}


def plot_checkpoint_curve(curve: CheckpointCurve, ax: Axes | None = None) -> Axes:
    """Draws step time over device memory: the best choices as a line, the fixed rules as marks, the device's memory as a wall.

    Args:
        curve: Of `simtrain.checkpoint_curve`.
        ax: Where to draw; new Axes by default.
    """
    ax = new_axes(8, 5) if ax is None else ax
    memory = [p.device_bytes / 2**30 for p in curve.optimal]
    times = [p.step_time_s * 1e3 for p in curve.optimal]
    ax.plot(memory, times, drawstyle="steps-post", marker=".", color="#1f4e79", label="optimal (whole blocks)", zorder=2)
    for point in curve.rules:
        marker, colour = _RULE_MARKS.get(point.name, ("x", "#555555"))
        place = point.device_bytes / 2**30, point.step_time_s * 1e3
        ax.plot(*place, marker, color=colour, markersize=8, label=point.name, linestyle="none", zorder=3)
    capacity = curve.capacity_bytes / 2**30
    if capacity < 3 * max(memory):
        ax.axvline(capacity, color="#b23a48", linestyle="--", linewidth=1)
        ax.axvspan(
            capacity, max(capacity * 1.02, 1.04 * max(*memory, *(p.device_bytes / 2**30 for p in curve.rules))), color="#b23a48", alpha=0.06
        )
        ax.annotate("device memory", (capacity, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", fontsize=8)
    ax.set_xlabel("device memory (GiB)")
    ax.set_ylabel("step time (ms)")
    ax.set_title(f"{curve.workload} on {curve.cluster} [{curve.strategy}]", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    return ax


__all__ = ["plot_checkpoint_curve"]
