"""Plots of runs. Each draws on the Axes it is given, or on new ones, and returns them; nothing is shown or saved here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from simtrain.core.units import format_time
from simtrain.report.plots import new_axes
from simtrain.run.run_result import RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from simtrain.run.power_cap import CapPoint

_DAY_S, _HOUR_S = 86400.0, 3600.0
_MANY = 60
_LONG_S = 3 * _DAY_S  # from here on plots count in days

RUN_COLOURS = {
    "productive": "#4a86b8",
    "recomputed": "#f2b872",
    "slowed": "#c9a227",
    "snapshot": "#5f9e6e",
    "evaluation": "#9cc3e0",
    "detection": "#b23a48",
    "restart": "#6a4c93",
    "waiting": "#c8c8c8",
}
"""Colour of each part of a run's time."""

EVENT_MARKS = {
    "failure": ("x", "#b23a48"),
    "preemption": ("v", "#e07b39"),
    "slow": ("s", "#c9a227"),
    "silent": ("*", "#6a4c93"),
    "join": ("^", "#5f9e6e"),
    "resize": ("D", "#1f4e79"),
}
"""Marker and colour of the events that are drawn."""


def plot_run(result: RunResult, ax: Axes | None = None) -> Axes:
    """Draws loss (where a law gives one, else steps done) and batch size over time, with what happened as marks.

    Args:
        result: Of a run.
        ax: Where to draw; new Axes by default. The batch size is drawn on a twin of it.
    """
    ax = new_axes(10, 5) if ax is None else ax
    unit_s, unit = _unit(result.time_s)
    time_s, step = np.array(result.progress).T
    curve_step, _, batch, loss = np.array(result.curve).T
    # Points of the curve lie between those of the progress: where the run goes straight, more points cost nothing and show the bend.
    fine_s = np.unique(np.concatenate([time_s, np.linspace(0, result.time_s, 400)]))
    fine_step = np.interp(fine_s, time_s, step)
    with_loss = not math.isnan(loss[-1])
    shown = np.interp(fine_step, curve_step, loss) if with_loss else fine_step
    begun = fine_step >= (curve_step[0] if with_loss else 0)
    ax.plot(fine_s[begun] / unit_s, shown[begun], color="#1f4e79", linewidth=1.4, label="loss" if with_loss else "steps done")

    def height(at_s: FloatArray) -> FloatArray:
        reached = np.interp(at_s, time_s, step)
        return np.asarray(np.interp(reached, curve_step, loss) if with_loss else reached, dtype=np.float64)

    _mark_events(ax, result, unit_s, height)
    ax.set_xlabel(f"time ({unit})")
    ax.set_ylabel("loss (nats per token)" if with_loss else "steps done")
    if with_loss:
        upper = float(np.interp(result.steps * 0.04, curve_step, loss))  # the first steps would hide the rest
        ax.set_ylim(loss[-1] - 0.06 * (upper - loss[-1]), upper)
    twin = ax.twinx()
    twin.step(
        fine_s / unit_s,
        batch[np.minimum(np.searchsorted(curve_step, fine_step), len(batch) - 1)],
        where="post",
        color="#e07b39",
        linewidth=1,
    )
    twin.set_ylabel("batch (samples)", color="#e07b39")
    twin.set_ylim(0, float(batch.max()) * 1.15)
    ax.set_title(
        f"{result.workload} on {result.cluster} to {result.target}: {format_time(result.time_s)}, goodput {result.goodput:.1%}", fontsize=10
    )
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=6, fontsize=8, frameon=False)
    return ax


def _mark_events(ax: Axes, result: RunResult, unit_s: float, height: Callable[[FloatArray], FloatArray]) -> None:
    for kind, (marker, colour) in EVENT_MARKS.items():
        at = np.array([e.time_s for e in result.events if e.kind == kind])
        if len(at):
            label = f"{kind} ({len(at)})"
            if len(at) > _MANY:  # as a fringe along the axis, where they do not hide the curve
                ax.plot(at / unit_s, np.full(len(at), 0.015), "|", color=colour, alpha=0.5, transform=ax.get_xaxis_transform(), label=label)
            else:
                ax.plot(at / unit_s, height(at), marker, color=colour, markersize=5, alpha=0.7, linestyle="none", label=label)


def plot_goodput(results: Mapping[str, RunResult] | Iterable[RunResult] | RunResult, ax: Axes | None = None) -> Axes:
    """Draws where the time went, as a waterfall: from the productive part over each loss to the whole time.

    Several runs stand above each other, in shares of their own time.

    Args:
        results: One or several, perhaps by name.
        ax: Where to draw; new Axes by default.

    Raises:
        InputError: No results.
    """
    if isinstance(results, Mapping):
        names, rows = [str(name) for name in results], list(results.values())
    else:
        rows = [results] if isinstance(results, RunResult) else list(results)
        names = [f"{r.strategy}\n{r.cluster}" for r in rows]
    if not rows:
        raise InputError("plot_goodput needs at least one run")
    return _waterfall(rows[0], ax) if len(rows) == 1 else _shares(names, rows, ax)


def _waterfall(result: RunResult, ax: Axes | None) -> Axes:
    unit_s, unit = _unit(result.time_s)
    parts = {k: v for k, v in result.split_s.items() if v > 0}
    ax = new_axes(8, 1.4 + 0.45 * len(parts)) if ax is None else ax
    lost = result.time_s - result.split_s["productive"]
    left = 0.0
    for i, (part, time_s) in enumerate([*parts.items(), ("total", result.time_s)]):
        start = 0.0 if part in ("productive", "total") else left
        ax.barh(i, time_s / unit_s, left=start / unit_s, color=RUN_COLOURS.get(part, "#555555"), height=0.7)
        text = f" {time_s / result.time_s:.2%}, {format_time(time_s)}"
        ax.text((start + time_s) / unit_s, i, text, va="center", fontsize=8)
        left = start + time_s
    ax.set_yticks(range(len(parts) + 1), [*parts, "total"])
    ax.invert_yaxis()
    begin = max(0.0, result.split_s["productive"] - 2 * lost) if lost < 0.2 * result.time_s else 0.0
    ax.set_xlim(begin / unit_s, (result.time_s + 0.22 * (result.time_s - begin)) / unit_s)
    ax.set_xlabel(f"time ({unit}){', the axis does not begin at zero' if begin else ''}")
    ax.set_title(f"{result.workload} to {result.target}: goodput {result.goodput:.2%}", fontsize=10)
    return ax


def _shares(names: Sequence[str], rows: Sequence[RunResult], ax: Axes | None) -> Axes:
    ax = new_axes(9, 1.4 + 0.5 * len(rows)) if ax is None else ax
    left = np.zeros(len(rows))
    for part, colour in RUN_COLOURS.items():
        width = np.array([r.split_s[part] / r.time_s for r in rows])
        if width.any():
            ax.barh(range(len(rows)), width, left=left, color=colour, label=part)
            left += width
    ax.set_yticks(range(len(rows)), [f"{name}, {format_time(r.time_s)}" for name, r in zip(names, rows, strict=True)], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the run's time")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, fontsize=8, frameon=False)
    return ax


def plot_tradeoff(runs: Mapping[str, RunResult] | Sequence[CapPoint], ax: Axes | None = None) -> Axes:
    """Draws energy against time, cost as the size of the points, and the frontier that nothing else beats in all three as a line.

    Args:
        runs: Runs by name, or what `cap_tradeoff` returned (of a step).
        ax: Where to draw; new Axes by default.

    Raises:
        InputError: Nothing to draw.
    """
    if not runs:
        raise InputError("plot_tradeoff needs at least one point")
    ax = new_axes(7, 5) if ax is None else ax
    if isinstance(runs, Mapping):
        names = list(runs)
        rows = np.array([(r.time_s, r.energy_j, r.cost_usd) for r in runs.values()])
        unit_s, unit = _unit(rows[:, 0].max())
        energy_unit, energy_name, of = 3.6e6, "kWh", "run"
    else:
        names = [f"{p.cap_w:g} W" for p in runs]
        rows = np.array([(p.price.step_time_s, p.energy_j, p.usd) for p in runs])
        unit_s, unit, energy_unit, energy_name, of = 1.0, "s", 1.0, "J", "step"
    best = ~np.array([((rows <= row).all(axis=1) & (rows < row).any(axis=1)).any() for row in rows])
    x, y = rows[:, 0] / unit_s, rows[:, 1] / energy_unit
    sizes = 40 + 160 * rows[:, 2] / rows[:, 2].max() if rows[:, 2].max() > 0 else np.full(len(rows), 60.0)
    ax.scatter(x[~best], y[~best], s=sizes[~best], color="#c8c8c8", label="beaten in time, energy and cost")
    ax.scatter(x[best], y[best], s=sizes[best], color="#4a86b8", label="frontier (size: cost)")
    order = np.flatnonzero(best)[np.argsort(x[best])]
    ax.plot(x[order], y[order], color="#4a86b8", linewidth=1)
    for name, at_x, at_y in zip(names, x, y, strict=True):
        ax.annotate(name, (at_x, at_y), xytext=(7, 6), textcoords="offset points", fontsize=8)
    ax.margins(0.15)
    ax.set_xlabel(f"time of a {of} ({unit})")
    ax.set_ylabel(f"energy of a {of} ({energy_name})")
    ax.legend(fontsize=8, frameon=False)
    return ax


def plot_finish(results: Mapping[str, RunResult] | RunResult, ax: Axes | None = None) -> Axes:
    """Draws when runs get done over their seeds: the share of seeds that are done by a time, with median, p10 and p90.

    Args:
        results: A run with several seeds, or several by name.
        ax: Where to draw; new Axes by default.

    Raises:
        InputError: A run with one seed only has no distribution.
    """
    runs = {results.strategy: results} if isinstance(results, RunResult) else dict(results)
    if not runs or any(len(r.times_s) < 2 for r in runs.values()):
        raise InputError("plot_finish needs runs with at least two seeds: simulate_run(..., seeds=100)")
    ax = new_axes(8, 4.5) if ax is None else ax
    unit_s, unit = _unit(max(max(r.times_s) for r in runs.values()))
    for i, (name, run) in enumerate(runs.items()):
        times = np.sort(run.times_s) / unit_s
        colour = list(RUN_COLOURS.values())[i % len(RUN_COLOURS)]
        marks = np.quantile(times, [0.1, 0.5, 0.9])
        label = f"{name}: median {marks[1]:.3g}, p10 {marks[0]:.3g}, p90 {marks[2]:.3g} ({run.seeds} seeds)"
        ax.step(times, np.arange(1, len(times) + 1) / len(times), where="post", color=colour, label=label)
        ax.plot(marks, [0.1, 0.5, 0.9], "o", color=colour, markersize=5)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel(f"done after ({unit})")
    ax.set_ylabel("share of seeds")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=1 if len(runs) < 4 else 2, fontsize=8, frameon=False)
    return ax


def plot_batch_law(batches: Sequence[float], steps: Sequence[float], ax: Axes | None = None) -> Axes:
    """Draws runs to one target by their batch, the law fitted to them with its 90 % interval, and where it is extrapolated.

    Args:
        batches: Of each run.
        steps: Each run took.
        ax: Where to draw; new Axes by default.

    Raises:
        InputError: Too few runs, or runs that contradict the law.
    """
    from simtrain.run.batch_law import fit_batch_law

    law = fit_batch_law(batches, steps)
    ax = new_axes(8, 5) if ax is None else ax
    low, high = law.fitted_batches
    wide = np.geomspace(low / 4, 4 * max(high, law.noise_scale), 200)
    ends = np.array([law.interval(batch) for batch in wide])
    shown = [law.steps(batch) for batch in wide]
    inside = (wide >= low) & (wide <= high)
    ax.fill_between(
        wide, np.maximum(ends[:, 0], min(shown) / 3), ends[:, 1], color="#4a86b8", alpha=0.15, linewidth=0, label="90 % interval"
    )
    ax.plot(wide, shown, "--", color="#4a86b8", linewidth=1, label="extrapolated")
    ax.plot(wide[inside], np.array(shown)[inside], color="#1f4e79", label=f"{law.min_steps:.4g} (1 + {law.noise_scale:.4g} / batch)")
    ax.plot(wide, law.steps(low) * low / wide, ":", color="#999999", linewidth=1, label="steps as 1 / batch")
    ax.plot(batches, steps, "o", color="#b23a48", markersize=5, label="runs")
    ax.axvline(law.noise_scale, color="#c9a227", linewidth=1, label="noise scale")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(min(*shown, *steps) / 2, 1.5 * max(*shown, *steps))
    ax.set_xlabel("batch (samples)")
    ax.set_ylabel("steps to the target")
    ax.legend(fontsize=8, frameon=False)
    return ax


def _unit(time_s: float) -> tuple[float, str]:
    return (_DAY_S, "days") if time_s >= _LONG_S else (_HOUR_S, "hours")
