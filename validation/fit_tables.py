"""The engine as a table over constants, so that fits with groups held out take seconds.

A row's step time is computed by the engine at a centre and at further values of one constant at a time; between them the logarithm of the
time is linear in the logarithm of the constant, and effects of several constants multiply. Constants are found on the table; what they
then predict is asked of the engine itself (`engine_times`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from validation.fit_published import Values
from validation.fit_sources import step_time_s
from validation.layout_rows import LayoutRow
from validation.layouts import LayoutSet, load_layouts

PROGRESS_ROWS = 10
"""Rows between two lines of progress."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A constant and where the engine is evaluated.

    Attributes:
        name: As `fit_published.Constant` names it.
        centre: Value of it while others change.
        values: Further values.
    """

    name: str
    centre: float
    values: tuple[float, ...]

    def touches(self, dataset: LayoutSet, row: LayoutRow) -> bool:
        """Whether the constant can matter to a row: its link is there, its runtime runs it; constants of devices always can."""
        kind, _, rest = self.name.partition(".")
        if kind == "link":
            nodes = dataset.cluster(row).nodes
            return any(link is not None and rest.startswith(f"{link.name}.") for n in nodes for link in (n.nic, n.peer_link, n.host_link))
        if kind == "runtime" and "." in rest:
            return dataset.runtime_of(row).name == rest.partition(".")[0]
        return True


@dataclass(frozen=True, eq=False)
class FitTable:
    """Logarithms of step times: at the centre, and what each constant adds at each of its values.

    Attributes:
        axes: The constants.
        centre: Logarithm of the time of every row with all constants at their centre.
        effects: By constant, one line per row, one column per value (the centre among them, in rising order).
    """

    axes: tuple[Axis, ...]
    centre: FloatArray
    effects: Mapping[str, FloatArray]

    def predict(self, values: Values, chosen: Sequence[int]) -> FloatArray:
        """Returns times of some rows under given constants; those not named stay at their centre."""
        rows = list(chosen)
        logs = self.centre[rows].copy()
        for axis in self.axes:
            if axis.name in values:
                logs += _between(
                    np.log(sorted((axis.centre, *axis.values))), self.effects[axis.name][rows], float(np.log(values[axis.name]))
                )
        return np.asarray(np.exp(logs))


def _between(nodes: FloatArray, effects: FloatArray, at: float) -> FloatArray:
    """Effects between nodes, and in a straight line beyond them."""
    i = int(np.clip(np.searchsorted(nodes, at), 1, len(nodes) - 1))
    share = (at - nodes[i - 1]) / (nodes[i] - nodes[i - 1])
    return np.asarray(effects[:, i - 1] + share * (effects[:, i] - effects[:, i - 1]))


def tabulate(
    rows: Sequence[tuple[LayoutSet, LayoutRow]], axes: Sequence[Axis], *, workers: int = 1, progress: Callable[[str], None] | None = None
) -> FitTable:
    """Runs the engine over rows of shipped sources.

    Args:
        rows: With their sources.
        axes: The constants.
        workers: Processes.
        progress: Called with a line of text now and then.

    Raises:
        InputError: A constant without a further value.
        SimtrainError: A row is refused.
    """
    if any(not axis.values for axis in axes):
        raise InputError("every constant needs a value beside its centre")
    centre = {axis.name: axis.centre for axis in axes}
    jobs = [(dataset.name, dataset.rows.index(row), axes, centre) for dataset, row in rows]
    with ProcessPoolExecutor(workers) as pool:
        lines = []
        for line in pool.map(_line, jobs, chunksize=2):
            lines.append(line)
            if progress is not None and len(lines) % PROGRESS_ROWS == 0:
                progress(f"{len(lines)} of {len(jobs)} rows predicted under changed constants")
    effects = {axis.name: np.array([line[1][k] for line in lines]) for k, axis in enumerate(axes)}
    return FitTable(tuple(axes), np.array([line[0] for line in lines]), effects)


def engine_times(rows: Sequence[tuple[LayoutSet, LayoutRow]], values: Sequence[Values], *, workers: int = 1) -> FloatArray:
    """Predicts rows of shipped sources, each under its own constants, by the engine itself.

    Raises:
        SimtrainError: A row is refused.
    """
    jobs = [(dataset.name, dataset.rows.index(row), dict(own)) for (dataset, row), own in zip(rows, values, strict=True)]
    with ProcessPoolExecutor(workers) as pool:
        return np.array(list(pool.map(_time, jobs, chunksize=2)), dtype=np.float64)


def _time(job: tuple[str, int, dict[str, float]]) -> float:
    name, number, values = job
    dataset = load_layouts(name)
    return step_time_s(dataset, dataset.rows[number], values)


def _line(job: tuple[str, int, Sequence[Axis], dict[str, float]]) -> tuple[float, list[list[float]]]:
    name, number, axes, centre = job
    dataset = load_layouts(name)
    row = dataset.rows[number]
    base = float(np.log(step_time_s(dataset, row, centre)))
    found: list[list[float]] = []
    for axis in axes:
        touched = axis.touches(dataset, row)
        changes = {v: float(np.log(step_time_s(dataset, row, centre | {axis.name: v}))) - base if touched else 0.0 for v in axis.values}
        found.append([changes.get(v, 0.0) for v in sorted((axis.centre, *axis.values))])
    return base, found
