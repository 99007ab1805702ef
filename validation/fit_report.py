"""Held-out fits of all published layouts: what a handful of physical constants is worth on groups that they have not seen.

Every group (a model, or a family of layouts) is predicted with constants fitted to everything else, other sources included. Forms differ
in what is free; the shipped constants are one of them, with nothing fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from validation.errors import ErrorSummary, skill, summarise
from validation.fit_published import DEVICE_CONSTANTS, NETWORK_CONSTANTS, SOFTWARE_CONSTANTS, Constant, Fit, fit_constants
from validation.fit_sources import FitProblem, fit_problem
from validation.fit_tables import Axis, FitTable, engine_times, tabulate
from validation.layouts import LAYOUT_SETS, UNSEEN, load_layouts
from validation.statistics import RegretSummary, choices, held_out_constants, interval_of_mean, regret

Progress = Callable[[str], None]

FIT_SOURCES = tuple(name for name in LAYOUT_SETS if name not in ("vtrain_single_node", "megatron_reference", *UNSEEN))
"""Sources that constants are fitted to: not another simulator's output, nor small models whose times are the host's."""

FORMS: Mapping[str, tuple[Constant, ...]] = {
    "as shipped": (),
    "network and software": (*NETWORK_CONSTANTS, *SOFTWARE_CONSTANTS),
    "devices as well": (*NETWORK_CONSTANTS, *SOFTWARE_CONSTANTS, *DEVICE_CONSTANTS),
}
"""Forms by name: what is free in them."""

GRID_SPREADS = 1.5
"""Where the engine is evaluated on both sides of a prior, in its spreads (never beyond the constant's limits)."""


@dataclass(frozen=True, slots=True)
class HeldOutSource:
    """A source under one form and one grouping.

    Attributes:
        source: Its name.
        by: Fields of the rows that are held out together.
        groups: How many groups they make.
        errors: Each group predicted without it, by the engine.
        in_sample: Predicted by the fit to all rows, on its table.
        null: Of the best constant per device and arithmetic path of the source's other groups.
        null_in_sample: Of the best such constant of these very rows.
        interval: 90 % bootstrap interval of the mean held-out error, drawing groups.
        decisions: Ranks and regret among layouts of one model, machine and batch, by held-out predictions.
        variants_looked_at: Ways of predicting the source that were tried with its errors in sight, the forms here among them.
    """

    source: str
    by: tuple[str, ...]
    groups: int
    errors: ErrorSummary
    in_sample: ErrorSummary
    null: ErrorSummary | None
    null_in_sample: ErrorSummary
    interval: tuple[float, float] | None
    decisions: RegretSummary | None
    variants_looked_at: int

    @property
    def skill(self) -> float | None:
        """1 - error / error of the null, both held out."""
        return skill(self.errors, self.null) if self.null else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        summaries = {
            "errors": self.errors,
            "in_sample": self.in_sample,
            "null": self.null,
            "null_in_sample": self.null_in_sample,
            "decisions": self.decisions,
        }
        return {
            "source": self.source,
            "by": list(self.by),
            "groups": self.groups,
            "skill": self.skill,
            "interval_90": self.interval,
            "variants_looked_at": self.variants_looked_at,
            **{name: part.to_dict() if part else None for name, part in summaries.items()},
        }


@dataclass(frozen=True, slots=True)
class FittedForm:
    """A form with its constants.

    Attributes:
        name: Key of `FORMS`.
        constants: What was free, those that no row depends on left out.
        fit: To all rows; `None` where nothing is free.
        spread: Smallest and largest value of each constant over the folds.
        limited: Constants that ended on a limit, with the number of folds.
        sources: Errors by source and grouping.
        deviation: Mean error of the table that constants were found on, against the engine, over all held-out predictions.
    """

    name: str
    constants: tuple[Constant, ...]
    fit: Fit | None
    spread: Mapping[str, tuple[float, float]]
    limited: Mapping[str, int]
    sources: tuple[HeldOutSource, ...]
    deviation: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        priors = [
            {"name": c.name, "prior": c.prior, "spread": c.spread, "low": c.low, "high": c.high, "why": c.source} for c in self.constants
        ]
        return {
            "name": self.name,
            "priors": priors,
            "fit": self.fit.to_dict() if self.fit else None,
            "spread": dict(self.spread),
            "folds_at_limit": dict(self.limited),
            "table_deviation": self.deviation,
            "sources": [s.to_dict() for s in self.sources],
        }


@dataclass(frozen=True, slots=True)
class FitReport:
    """All forms over the chosen sources.

    Attributes:
        forms: In the order of `FORMS`.
        refused: Rows left out because the engine refuses them, by source.
        provenance: When, and with which versions.
    """

    forms: tuple[FittedForm, ...]
    refused: Mapping[str, int]
    provenance: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "command": "simtrain validate published --fit",
            "provenance": dict(self.provenance),
            "refused": dict(self.refused),
            "weights": "sources count alike",
            "forms": [f.to_dict() for f in self.forms],
        }


def fit_layouts(names: Sequence[str] = FIT_SOURCES, *, workers: int = 1, progress: Progress | None = None) -> FitReport:
    """Fits every form with groups held out.

    Args:
        names: Of sources in `FIT_SOURCES`, which are fitted together.
        workers: Processes that predict rows.
        progress: Called with a line of text now and then.

    Raises:
        InputError: A source that constants are not fitted to, or one group alone.
    """
    if unfit := [name for name in names if name not in FIT_SOURCES]:
        raise InputError(f"constants are not fitted to {unfit[0]!r}: give some of {', '.join(FIT_SOURCES)}")
    say = progress or (lambda _: None)
    say(f"predicting {', '.join(names)} as shipped")
    problems = {name: fit_problem([load_layouts(name)]) for name in names}
    rows = tuple(row for problem in problems.values() for row in problem.rows)
    problem = FitProblem(rows, sum(p.refused for p in problems.values()))
    if len(set(problem.groups())) < 2:
        raise InputError("holding out needs at least two groups of rows")
    everything = dict.fromkeys(c for form in FORMS.values() for c in form)
    axes = {c: axis for c in everything if any((axis := _axis(c)).touches(*row) for row in rows)}
    table = tabulate(rows, tuple(axes.values()), workers=workers, progress=say)
    forms = []
    for name, free in FORMS.items():
        say(f"fitting: {name}")
        forms.append(_fit_form(name, tuple(c for c in free if c in axes), problem, table, workers))
    return FitReport(tuple(forms), {name: p.refused for name, p in problems.items()}, _provenance())


def _axis(constant: Constant) -> Axis:
    reach = math.exp(GRID_SPREADS * constant.spread)
    around = {max(constant.low, constant.prior / reach), min(constant.high, constant.prior * reach)} - {constant.prior}
    if len(around) == 1:  # a prior on its limit: two values on the other side
        around.add(math.sqrt(constant.prior * next(iter(around))))
    return Axis(constant.name, constant.prior, tuple(sorted(around)))


def _fit_form(name: str, constants: tuple[Constant, ...], problem: FitProblem, table: FitTable, workers: int) -> FittedForm:
    if not constants:
        shipped = table.predict({}, range(len(problem.rows)))
        return FittedForm(name, (), None, {}, {}, _judge(problem, shipped, lambda _: shipped), 0.0)
    whole = fit_constants(table.predict, problem.measured, constants, weights=problem.weights)
    folds: dict[tuple[int, ...], Fit] = {}
    exact: dict[tuple[int, ...], FloatArray] = {}

    def without(groups: Sequence[Hashable]) -> FloatArray:
        """Every row, predicted by constants that its group had no part in."""
        inside = {group: tuple(i for i, g in enumerate(groups) if g == group) for group in dict.fromkeys(groups)}
        new = [rows for rows in inside.values() if rows not in folds]
        for rows in new:
            others = sorted(set(range(len(groups))) - set(rows))
            folds[rows] = fit_constants(
                table.predict, problem.measured, constants, rows=others, weights=problem.weights, start=whole.values
            )
        asked = [(i, folds[rows].values) for rows in new for i in rows]
        times = engine_times([problem.rows[i] for i, _ in asked], [values for _, values in asked], workers=workers)
        ends = np.cumsum([len(rows) for rows in new])
        exact.update(zip(new, np.split(times, ends[:-1]) if new else (), strict=True))
        predicted = np.empty(len(groups))
        for rows in inside.values():
            predicted[list(rows)] = exact[rows]
        return predicted

    sources = _judge(problem, table.predict(whole.values, range(len(problem.rows))), without)
    values = {c.name: [fold.values[c.name] for fold in folds.values()] for c in constants}
    limited = {c.name: sum(c.name in fold.at_limit for fold in folds.values()) for c in constants}
    off = [np.abs(table.predict(folds[rows].values, rows) / times - 1) for rows, times in exact.items()]
    return FittedForm(
        name=name,
        constants=constants,
        fit=whole,
        spread={key: (min(found), max(found)) for key, found in values.items()},
        limited={key: count for key, count in limited.items() if count},
        sources=sources,
        deviation=float(np.concatenate(off).mean()),
    )


def _judge(problem: FitProblem, in_sample: FloatArray, without: Callable[[Sequence[Hashable]], FloatArray]) -> tuple[HeldOutSource, ...]:
    """Errors of every source, with its families of layouts and with its models held out."""
    found = []
    for name in dict.fromkeys(dataset.name for dataset, _ in problem.rows):
        chosen = [i for i, (dataset, _) in enumerate(problem.rows) if dataset.name == name]
        dataset = problem.rows[chosen[0]][0]
        for by in dict.fromkeys((dataset.fit_group_by, dataset.group_by)):
            groups = problem.groups()
            for i in chosen:
                groups[i] = (name, *by, *dataset.group(problem.rows[i][1], by))
            found.append(_source(problem, chosen, by, groups, in_sample, without(groups)))
    return tuple(found)


def _source(
    problem: FitProblem,
    chosen: Sequence[int],
    by: tuple[str, ...],
    groups: Sequence[Hashable],
    in_sample: FloatArray,
    held_out: FloatArray,
) -> HeldOutSource:
    own, rows = [groups[i] for i in chosen], [problem.rows[i][1] for i in chosen]
    dataset, measured = problem.rows[chosen[0]][0], problem.measured[chosen]
    errors = held_out[chosen] / measured - 1
    ratios = (np.array([dataset.seconds_at_peak(row) for row in rows]) / measured).tolist()
    pools = [(row.machine, row.precision) for row in rows]
    alone = [scale * r - 1 for scale, r in zip(held_out_constants(ratios, pools, own), ratios, strict=True) if scale is not None]
    nobody = held_out_constants([*ratios, *ratios], [*pools, *pools], [*([0] * len(rows)), *([1] * len(rows))])
    best = [scale * r - 1 for scale, r in zip(nobody, ratios, strict=False) if scale is not None]
    options = choices([dataset.choice(r) for r in rows], [r.layout for r in rows], held_out[chosen].tolist(), measured.tolist())
    return HeldOutSource(
        source=dataset.name,
        by=by,
        groups=len(set(own)),
        errors=summarise(errors.tolist()),
        in_sample=summarise((in_sample[chosen] / measured - 1).tolist()),
        null=summarise(alone) if alone else None,
        null_in_sample=summarise(best),
        interval=interval_of_mean(np.abs(errors).tolist(), own),
        decisions=regret(options),
        variants_looked_at=dataset.variants_looked_at + len(FORMS) - 1,
    )


def _provenance() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("simtrain", "numpy", "scipy")}
    return {"date_utc": datetime.now(UTC).isoformat(timespec="seconds"), **packages}


__all__ = ["FIT_SOURCES", "FORMS", "FitReport", "FittedForm", "HeldOutSource", "fit_layouts"]
