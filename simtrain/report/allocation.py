"""An allocation for people: a table of who runs what, what each kind of device adds, and a Gantt chart of one step."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from simtrain.core.result import TraceEvent
from simtrain.core.units import format_bytes, format_time
from simtrain.report.plots import new_axes
from simtrain.report.text import bullets, facts, plain_table
from simtrain.report.timeline import CATEGORY_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType
    from rich.table import Table

    from simtrain.planner.allocation.result import Allocation

_OTHER = "#d0d0d0"
_BAR_HEIGHT = 0.8


def allocation_table(allocation: Allocation) -> RenderableType:
    """Returns an allocation in full: speed and bound, the stages of every group of replicas, what each kind adds, assumptions."""
    from rich.console import Group

    parts: list[RenderableType] = [_headline(allocation), "", _stages(allocation)]
    if allocation.worth:
        parts.append(_worth(allocation))
    return Group(*parts, bullets("Assumed or left out", allocation.assumptions))


def _headline(a: Allocation) -> Table:
    idle = ", ".join(f"{n} x {kind}" for kind, n in a.left_out.items() if n)
    verdict = "executable" if a.carrier.executable else "hypothetical"
    return facts(
        [
            ("workload", f"{a.workload}, global batch {a.global_batch}"),
            ("cluster", a.cluster),
            ("step time", f"{format_time(a.step_time_s)}, {a.samples_per_s:.4g} samples/s"),
            ("bound", f"no allocation is faster than {format_time(a.bound_s)}: at most {a.gap:.1%} of the step could be saved"),
            ("reduction", f"{format_time(a.synchronise_s)} of gradients{' and parameters' * (a.zero > 0)} behind the last backward pass"),
            ("states", "shared by the replicas (ZeRO stage 1)" if a.zero else "whole in every replica"),
            ("left out", idle or "nothing"),
            *[("memory", "DOES NOT FIT: some stages need more than their devices have")] * (not a.fits),
            ("plan is", f"{verdict}: {a.carrier.reason}"),
            ("energy", f"{a.energy_j:.4g} J per step"),
            ("cost", f"{a.cost_usd:.3g} USD per step" if a.cost_usd else "no price known"),
            ("search", f"{a.templates} templates, {format_time(a.elapsed_s)}"),
        ]
    )


def _stages(a: Allocation) -> Table:
    numeric = ("group", "copies", "stage", "wide", "layers", "micro-batch", "count", "batch share", "memory")
    table = plain_table(
        "Groups of equal replicas", *numeric[:3], "device", "precision", *numeric[3:5], "checkpoint", *numeric[5:], numeric=numeric
    )
    previous = 0
    for row in a.rows():
        first = row["group"] != previous
        previous = row["group"]
        table.add_row(
            str(row["group"]) if first else "",
            str(row["copies"]) if first else "",
            str(row["stage"]),
            row["device"],
            row["precision"],
            f"{row['tensor']}{' seq' * row['sequence_parallel']}",
            f"{row['first_layer']} to {row['first_layer'] + row['layers'] - 1}",
            row["checkpoint"],
            str(row["micro_batch"]) if first else "",
            str(row["micro_batches"]) if first else "",
            f"{row['batch_share']:.1%}" if first else "",
            f"{format_bytes(row['memory_bytes'])} ({row['memory_share']:.0%})",
        )
    return table


def _worth(a: Allocation) -> Table:
    numeric = ("used", "share", "busy", "one fewer", "none of them", "energy", "energy without", "cost")
    table = plain_table("What each kind adds", "kind", *numeric, numeric=numeric)
    for w in a.worth:
        table.add_row(
            w.kind,
            f"{w.used} of {w.devices}",
            f"{w.share:.1%}",
            f"{w.busy:.0%}",
            _longer(w.without_one_s, a.step_time_s),
            _longer(w.without_all_s, a.step_time_s),
            f"{w.energy_j:.4g} J",
            f"{-w.energy_saved_j / a.energy_j:+.1%}" if isfinite(w.energy_saved_j) else "-",
            f"{w.cost_usd:.3g} USD" if w.cost_usd else "-",
        )
    return table


def _longer(other_s: float, step_s: float) -> str:
    return f"{format_time(other_s)} ({other_s / step_s - 1:+.1%})" if isfinite(other_s) else "no plan"


def plot_allocation(allocation: Allocation, ax: Axes | None = None) -> Axes:
    """Draws one step of an allocation as a Gantt chart: a row for each stage of each group of replicas.

    Forward and backward passes of micro-batches, recomputation, the optimizer, and the reduction of gradients that all wait for.

    Args:
        allocation: What `allocate` returned.
        ax: Where to draw; new Axes by default.
    """
    from matplotlib.patches import Patch

    lanes = list(dict.fromkeys(e.rank_class for e in allocation.events if e.stream == "compute"))
    ax = new_axes(12, 1.5 + 0.55 * len(lanes)) if ax is None else ax
    shown = [e for e in allocation.events if e.stream == "compute"]
    for y, lane in enumerate(lanes):
        _draw(ax, y, [e for e in shown if e.rank_class == lane])
    together = [e for e in allocation.events if e.stream == "communication"]
    for event in together:
        span = (event.start_s * 1e3, event.duration_s * 1e3)
        ax.broken_barh(
            [span], (-_BAR_HEIGHT / 2, len(lanes) - 1 + _BAR_HEIGHT), facecolors=CATEGORY_COLOURS["collective"], alpha=0.3, zorder=0.6
        )
    ax.set_yticks(range(len(lanes)), lanes, fontsize=9)
    ax.set_ylim(len(lanes) - 0.5, -0.5)
    ax.set_xlim(0, max((e.start_s + e.duration_s for e in (*shown, *together)), default=allocation.step_time_s) * 1e3)
    ax.set_xlabel("time (ms); every second micro-batch is a little lighter")
    title = f"{allocation.workload} on {allocation.cluster}: one step of {format_time(allocation.step_time_s)}"
    ax.set_title(f"{title}, bound {format_time(allocation.bound_s)}", fontsize=10)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    seen = {e.category for e in (*shown, *together)}
    handles = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in CATEGORY_COLOURS.items() if name in seen]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    return ax


def _draw(ax: Axes, y: int, events: Sequence[TraceEvent]) -> None:
    for category in dict.fromkeys(e.category for e in events):
        for odd in (False, True):
            spans = [(e.start_s * 1e3, e.duration_s * 1e3) for e in events if e.category == category and (e.micro_batch % 2 == 1) is odd]
            colour = CATEGORY_COLOURS.get(category, _OTHER)
            ax.broken_barh(spans, (y - _BAR_HEIGHT / 2, _BAR_HEIGHT), facecolors=colour, alpha=0.72 if odd else 1.0, linewidth=0)


def plot_shares(allocation: Allocation, ax: Axes | None = None) -> Axes:
    """Draws which share of the work each kind of device does, beside its share of the devices and of their energy.

    Args:
        allocation: With `worth`.
        ax: Where to draw; new Axes by default.
    """
    ax = new_axes(8, 3.2) if ax is None else ax
    kinds = [w.kind for w in allocation.worth]
    devices, energy = sum(w.devices for w in allocation.worth), sum(w.energy_j for w in allocation.worth)
    series = {
        "of devices": [w.devices / devices for w in allocation.worth],
        "of samples x layers": [w.share for w in allocation.worth],
        "of the devices' energy": [w.energy_j / energy if energy else 0.0 for w in allocation.worth],
    }
    for i, (name, values) in enumerate(series.items()):
        ax.bar([x + (i - 1) * 0.27 for x in range(len(kinds))], [100 * v for v in values], width=0.25, label=name)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set_ylabel("share (%)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    return ax
