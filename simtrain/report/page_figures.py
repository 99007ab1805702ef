"""Figures of a page, as plain data in the form that plotly.js draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.result import MemoryKind, MemoryTimeline, Result, TraceEvent
from simtrain.core.units import format_bytes, format_time
from simtrain.report.plots import MEMORY_COLOURS, PART_COLOURS, repeated_micro_batch
from simtrain.report.timeline import CATEGORY_COLOURS, GAP_SHARE, OTHER_COLOUR, Bar, merged, timeline_rows

if TYPE_CHECKING:
    from simtrain.planner.why import Worth

Figure = dict[str, Any]
"""`data` and `layout` of plotly.js."""


@dataclass(frozen=True, slots=True)
class Axis:
    """An aim as an axis: its name with the unit, and its value."""

    title: str
    value: Callable[[Result], float]


MOST_BARS = 2400
"""Bars of a timeline; of longer steps the beginning and the end are shown."""

MOST_ROWS = 14
SHOWN_OF_MANY = ("compute", "communication")
"""Streams that are shown where there are more rows than `MOST_ROWS`."""

MOST_MOMENTS = 900
"""Moments of memory over time; of more, the fullest of every so many is kept."""

ROW_PIXELS = 34
_GIB = 2.0**30
_BUBBLE = "#dfe3e8"
_UNTOUCHED = "#eceff3"
_CAPACITY = "#c0262d"


def breakdown(results: Sequence[tuple[str, Result]]) -> Figure:
    """What the step spends its time on: one stacked bar for each named result."""
    scale, unit = _time_unit(max(r.step_time_s for _, r in results))
    colours = PART_COLOURS | {"bubble": _BUBBLE}
    present = dict.fromkeys(part for _, r in results for part, time_s in r.breakdown_s.items() if time_s > 0)
    data = []
    for part in present:
        times = [r.breakdown_s.get(part, 0.0) for _, r in results]
        data.append(
            _stacked(
                part,
                [t / scale for t in times],
                [name for name, _ in results],
                colours.get(part, OTHER_COLOUR),
                [f"{t / r.step_time_s:.0%}" for t, (_, r) in zip(times, results, strict=True)],
                [f"{part}: {format_time(t)}, {t / r.step_time_s:.1%} of the step" for t, (_, r) in zip(times, results, strict=True)],
            )
        )
    return _bars_figure(data, len(results), f"time on the slowest rank ({unit})")


def memory(results: Sequence[tuple[str, Result]]) -> Figure:
    """Memory at its peak by kind, one stacked bar for each named result, against the device's capacity."""
    data = []
    for kind, colour in MEMORY_COLOURS.items():
        sizes = [r.memory.by_kind_bytes.get(kind.value, 0.0) for _, r in results]
        if any(size > 0 for size in sizes):
            hover = [f"{kind.value}: {format_bytes(size)}" for size in sizes]
            data.append(_stacked(kind.value, [s / _GIB for s in sizes], [n for n, _ in results], colour, [""] * len(sizes), hover))
    beside = [r.memory.device_bytes - sum(r.memory.by_kind_bytes.values()) for _, r in results]
    hover = [f"allocator's reserve and driver: {format_bytes(b)}" for b in beside]
    data.append(_stacked("reserve and driver", [b / _GIB for b in beside], [n for n, _ in results], _UNTOUCHED, [""] * len(beside), hover))
    figure = _bars_figure(data, len(results), "memory of the fullest device (GiB)")
    capacity = min(r.memory.capacity_bytes for _, r in results) / _GIB
    figure["layout"]["shapes"] = [_line(capacity, vertical=True)]
    figure["layout"]["annotations"] = [_note(f"capacity {capacity:.4g} GiB", x=capacity, y=1.0, yref="paper", yanchor="bottom")]
    figure["layout"]["margin"]["t"] = 24
    longest = max(capacity, *(r.memory.device_bytes / _GIB for _, r in results))
    figure["layout"]["xaxis"]["range"] = [0, longest * 1.05]
    return figure


def memory_over_time(result: Result) -> Figure | None:
    """Allocated memory over the step, stacked by kind; nothing where the reader keeps no timeline."""
    timeline = result.memory.timeline
    if timeline is None:
        return None
    chosen, kinds = _fullest(timeline), list(MemoryKind)
    steps = np.diff(timeline.time_s)
    known = len(steps) > 1 and np.ptp(steps) > 1e-9 * abs(steps.mean())
    scale, unit = _time_unit(float(timeline.time_s[-1] - timeline.time_s[0])) if known else (1.0, "")
    x = (np.maximum.accumulate(timeline.time_s)[chosen] / scale) if known else chosen.astype(np.float64)
    data: list[dict[str, Any]] = []
    for kind, colour in MEMORY_COLOURS.items():
        sizes = timeline.bytes_by_kind[chosen, kinds.index(kind)] / _GIB
        if sizes.any():
            line = {"width": 0, "shape": "hv", "color": colour}
            data.append(
                {"type": "scatter", "mode": "lines", "stackgroup": "memory", "name": kind.value, "x": _rounded(x), "y": _rounded(sizes)}
                | {"line": line, "fillcolor": colour, "hovertemplate": "%{y:.3~f} GiB"}
            )
    total = timeline.total_bytes[chosen] / _GIB
    moments = [timeline.moments[i] for i in chosen]
    line = {"width": 1, "color": "#1f2933", "shape": "hv"}
    data.append(
        {"type": "scatter", "mode": "lines", "name": "allocated", "x": _rounded(x), "y": _rounded(total), "text": moments, "line": line}
        | {"hovertemplate": "%{y:.3~f} GiB<br>%{text}"}
    )
    title = f"time in the step ({unit})" if known else "moments of the step, in the order the host issues operations"
    capacity = result.memory.capacity_bytes / _GIB
    layout: Figure = _layout(340, title) | {"hovermode": "x unified", "shapes": [], "annotations": []}
    layout["yaxis"] = {"title": {"text": "GiB"}, "rangemode": "tozero", "gridcolor": "#e6e9ee", "zeroline": False}
    _mark_gap(layout, x, moments, result)
    if capacity < 4 * float(total.max()):
        layout["shapes"] += [_line(capacity)]
        layout["annotations"] += [_note(f"capacity {capacity:.4g} GiB", x=1, xref="paper", y=capacity, yanchor="bottom", xanchor="right")]
    return {"data": data, "layout": layout}


def _mark_gap(layout: dict[str, Any], x: FloatArray, moments: Sequence[str], result: Result) -> None:
    """Veils a long time without moments: the ledger replays equal micro-batches once, the last one it names stands for the rest."""
    steps = np.diff(x)
    if len(steps) < 2 or steps.max() < 0.05 * (x[-1] - x[0]) or steps.max() < 50 * np.median(steps):
        return
    before = int(steps.argmax())
    begins, ends = float(x[before]), float(x[before + 1])
    veil = {"type": "rect", "fillcolor": "#fff", "opacity": 0.65, "line": {"width": 0}}
    layout["shapes"].append(veil | {"x0": begins, "x1": ends, "yref": "paper", "y0": 0, "y1": 1})
    micro_batch = repeated_micro_batch(result, moments[before])
    text = f"the same again for every<br>micro-batch after {micro_batch}" if micro_batch else "waits, or as before"
    layout["annotations"].append({"text": text, "x": (begins + ends) / 2, "y": 0.5, "yref": "paper", "showarrow": False, "bgcolor": "#fff"})


def timelines(result: Result) -> list[tuple[str, Figure]]:
    """What each stream of each rank class does when: the whole step, or the beginning and the end of a long one, each with a caption."""
    if not result.events:
        return []
    rows, hidden = timeline_rows(result)
    first_s = min(e.start_s for e in result.events)
    last_s = max(e.start_s + e.duration_s for e in result.events)
    several = len({rank_class for rank_class, _ in rows}) > 1
    left_out = f" {hidden} rank classes between the slowest and the fastest are left out." if hidden else ""
    if len(rows) > MOST_ROWS:
        rows = {key: events for key, events in rows.items() if key[1] in SHOWN_OF_MANY}
        left_out += " Hosts and sends are not shown; a trace has them (--trace)."
    named = {(f"{rank_class} · {stream}" if several else stream): events for (rank_class, stream), events in rows.items()}
    bars = [b for events in named.values() for b in merged(events, (last_s - first_s) * GAP_SHARE)]
    if len(bars) <= MOST_BARS:
        return [(f"The whole step.{left_out}", _timeline(named, (first_s, last_s)))]
    until_s = sorted(b.start_s for b in bars)[MOST_BARS // 2]
    from_s = sorted(b.end_s for b in bars)[-MOST_BARS // 2]
    begins = f"How a step of {format_time(result.step_time_s)} begins: its first {format_time(until_s - first_s)}.{left_out}"
    ends = f"How it ends: the last {format_time(last_s - from_s)}. What lies between repeats."
    return [(begins, _timeline(named, (first_s, until_s))), (ends, _timeline(named, (from_s, last_s)))]


def _timeline(rows: Mapping[str, Sequence[TraceEvent]], window_s: tuple[float, float]) -> Figure:
    scale, unit = _time_unit(window_s[1])
    groups: dict[str, list[tuple[str, Bar]]] = defaultdict(list)
    for row, events in rows.items():
        inside = [e for e in events if e.start_s + e.duration_s > window_s[0] and e.start_s < window_s[1]]
        for bar in merged(inside, (window_s[1] - window_s[0]) * GAP_SHARE):
            groups[bar.category].append((row, bar))
    data = []
    for category in (*(c for c in CATEGORY_COLOURS if c in groups), *sorted(set(groups) - set(CATEGORY_COLOURS))):
        found = groups[category]
        name = category.replace("_", " ")
        batch = [f", micro-batch {b.micro_batch}" if b.micro_batch >= 0 else "" for _, b in found]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": [row for row, _ in found],
                "base": _rounded([b.start_s / scale for _, b in found]),
                "x": _rounded([(b.end_s - b.start_s) / scale for _, b in found]),
                "text": [str(b.micro_batch) if b.micro_batch >= 0 else "" for _, b in found],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "constraintext": "inside",
                "customdata": [
                    f"{name}{words}: {format_time(b.start_s)} to {format_time(b.end_s)}, {format_time(b.end_s - b.start_s)}"
                    for words, (_, b) in zip(batch, found, strict=True)
                ],
                "hovertemplate": "%{customdata}<extra>%{y}</extra>",
                "marker": {
                    "color": CATEGORY_COLOURS.get(category, OTHER_COLOUR),
                    "opacity": [0.72 if b.micro_batch % 2 == 1 else 1.0 for _, b in found],
                    "line": {"width": 0},
                },
            }
        )
    layout = _layout(72 + ROW_PIXELS * len(rows), f"time ({unit}); numbers are micro-batches") | {"barmode": "overlay", "bargap": 0.22}
    layout["uniformtext"] = {"mode": "hide", "minsize": 9}
    layout["yaxis"] = {"categoryorder": "array", "categoryarray": list(rows), "autorange": "reversed", "automargin": True}
    layout["xaxis"] |= {"range": [window_s[0] / scale, window_s[1] / scale]}
    return {"data": data, "layout": layout}


def tradeoff(results: Sequence[Result], front: Sequence[Result], axes: Sequence[Axis]) -> Figure:
    """Every strategy as a point between two aims, with what no other beats in both joined by a line.

    Args:
        results: Best first.
        front: Those on the front.
        axes: Name and value of each aim, across and up.
    """
    across, up = axes
    symbols, colours = ("circle", "diamond", "square", "triangle-up"), ("#4a86b8", "#5f9e6e", "#6a4c93", "#c9a227")
    marker = {"size": 9, "opacity": 0.75, "line": {"width": 0}}
    data: list[dict[str, Any]] = []
    ordered = sorted(front, key=across.value)
    data.append(
        {"type": "scatter", "mode": "lines", "name": "beaten by none in both", "hoverinfo": "skip"}
        | {"x": [across.value(r) for r in ordered], "y": [up.value(r) for r in ordered]}
        | {"line": {"color": "#9aa5b1", "dash": "dot", "width": 1.5}}
    )
    for i, runtime in enumerate(dict.fromkeys(r.runtime for r in results)):
        of_it = [r for r in results if r.runtime == runtime]
        data.append(_points(runtime, of_it, axes, marker | {"symbol": symbols[i % 4], "color": colours[i % 4]}))
    star = {"symbol": "star", "size": 18, "color": "#e07b39", "line": {"color": "#fff", "width": 1}}
    data.append(_points("the best", results[:1], axes, star))
    layout = _layout(420, across.title) | {"hovermode": "closest"}
    layout["yaxis"] = {"title": {"text": up.title}, "gridcolor": "#e6e9ee", "zeroline": False, "automargin": True}
    return {"data": data, "layout": layout}


def _points(name: str, results: Sequence[Result], axes: Sequence[Axis], marker: dict[str, Any]) -> dict[str, Any]:
    hover = [
        f"<b>{format_time(r.step_time_s)}</b> a step, {r.samples_per_s:.3g} samples/s, MFU {r.mfu:.1%}<br>"
        f"{format_bytes(r.memory.device_bytes)} of {format_bytes(r.memory.capacity_bytes)}, bound by {r.bound_by}<br>"
        + "<br>".join(_wrapped(r.strategy))
        for r in results
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [axes[0].value(r) for r in results],
        "y": [axes[1].value(r) for r in results],
        "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": marker,
    }


def sensitivity(found: Sequence[Worth]) -> Figure:
    """What more of each resource is worth, as bars."""
    ordered = list(reversed(found))
    gains = [100 * w.gain for w in ordered]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": [w.change for w in ordered],
        "x": _rounded(gains),
        "text": [f"{g:+.1f} %" for g in gains],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{text} throughput<extra></extra>",
        "marker": {"color": ["#4a86b8" if w.fits else "#c8c8c8" for w in ordered]},
    }
    layout = _layout(66 + ROW_PIXELS * len(ordered), "throughput that it adds (%)") | {"showlegend": False, "bargap": 0.35}
    layout["yaxis"] = {"automargin": True}
    layout["xaxis"] |= {"range": [min(0.0, 1.2 * min(gains)), max(1.0, 1.25 * max(gains))]}
    return {"data": [bar], "layout": layout}


def _stacked(name: str, values: list[float], rows: list[str], colour: str, inside: list[str], hover: list[str]) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": _rounded(values),
        "y": rows,
        "text": inside,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "constraintext": "inside",
        "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"color": colour, "line": {"color": "#fff", "width": 1}},
    }


def _bars_figure(data: list[dict[str, Any]], rows: int, title: str) -> Figure:
    layout = _layout(110 + 46 * rows, title) | {"barmode": "stack", "bargap": 0.3, "uniformtext": {"mode": "hide", "minsize": 10}}
    layout["yaxis"] = {"autorange": "reversed", "automargin": True, "visible": rows > 1}
    return {"data": data, "layout": layout}


def _layout(height: int, across: str) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 56 if height > 300 else 12, "r": 24, "t": 12, "b": 46},
        "xaxis": {"title": {"text": across}, "gridcolor": "#e6e9ee", "zeroline": False, "automargin": True},
    }


def _line(at: float, *, vertical: bool = False) -> dict[str, Any]:
    place = {"x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1} if vertical else {"y0": at, "y1": at, "xref": "paper", "x0": 0, "x1": 1}
    return {"type": "line", "line": {"color": _CAPACITY, "width": 2}} | place


def _note(text: str, **place: Any) -> dict[str, Any]:
    return {"text": text, "showarrow": False, "font": {"color": _CAPACITY, "size": 12}} | place


def _fullest(timeline: MemoryTimeline) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Indices of the moments that are shown."""
    count = len(timeline.moments)
    if count <= MOST_MOMENTS:
        return np.arange(count)
    edges = np.linspace(0, count, MOST_MOMENTS + 1).astype(int)
    total = timeline.total_bytes
    fullest = [a + int(np.argmax(total[a:b])) for a, b in pairwise(edges)]
    return np.unique([0, *fullest, count - 2, count - 1])  # the ends too: the optimizer comes last


def _time_unit(longest_s: float) -> tuple[float, str]:
    return (1.0, "s") if longest_s >= 2.0 else (1e-3, "ms")


def _rounded(values: Any) -> list[float]:
    """Six digits: enough to draw, and a smaller file."""
    return [float(f"{v:.6g}") for v in values]


def _wrapped(strategy: str, width: int = 60) -> list[str]:
    import textwrap

    return textwrap.wrap(strategy.replace(",", ", "), width)
