"""Published sources as problems for `fit_published`: the engine as a function of constants, over the rows that it can predict."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from simtrain.core.errors import InputError, InternalError, SimtrainError
from simtrain.core.polynomial import FloatArray
from validation.fit_published import Constant, HeldOut, Values, Variant, hold_out, with_constants
from validation.layout_rows import LayoutRow
from validation.layouts import LayoutSet

StepTime = Callable[[LayoutSet, LayoutRow, Values], float]


def step_time_s(dataset: LayoutSet, row: LayoutRow, values: Values) -> float:
    """Predicts a row in closed form, with constants changed.

    Raises:
        SimtrainError: It is refused.
    """
    from simtrain.step.predict import estimate

    cluster, framework = with_constants(dataset.cluster(row), dataset.runtime_of(row), values)
    return estimate(dataset.workload(row), cluster, row.strategy(), runtime=framework).step_time_s


@dataclass(frozen=True, eq=False)
class FitProblem:
    """Rows of several sources that can be predicted, with what is held out together.

    Attributes:
        rows: With their sources.
        refused: How many rows were left out because the engine refuses them.
        step_time: The engine.
    """

    rows: tuple[tuple[LayoutSet, LayoutRow], ...]
    refused: int
    step_time: StepTime = step_time_s

    @cached_property
    def measured(self) -> FloatArray:
        """Times of a step."""
        return np.array([dataset.step_time_s(row) for dataset, row in self.rows], dtype=np.float64)

    @cached_property
    def weights(self) -> FloatArray:
        """Such that sources count alike, and the mean weight is 1."""
        names = [dataset.name for dataset, _ in self.rows]
        sizes = {name: names.count(name) for name in set(names)}
        return np.array([len(names) / len(sizes) / sizes[name] for name in names])

    def groups(self, by: Sequence[str] | None = None) -> list[Hashable]:
        """Returns what is held out together: a source's own `fit_group_by`, or the named fields of every row."""
        return [(dataset.name, *dataset.group(row, tuple(by) if by else dataset.fit_group_by)) for dataset, row in self.rows]

    def predict(self, values: Values, chosen: Sequence[int]) -> FloatArray:
        """Returns predicted times of some rows."""
        return np.array([self.step_time(*self.rows[i], values) for i in chosen], dtype=np.float64)

    def hold_out(self, constants: Sequence[Constant], by: Sequence[str] | None = None) -> HeldOut:
        """Fits constants with groups left out, the null under the same rule.

        Raises:
            InputError: Fewer than two groups.
        """
        ratios = np.array([dataset.seconds_at_peak(row) for dataset, row in self.rows]) / self.measured
        pools = [(dataset.machines[row.machine].device, row.precision) for dataset, row in self.rows]
        variant = Variant(self.predict, tuple(constants))
        return hold_out(variant, self.measured, self.groups(by), null_ratios=ratios, null_pools=pools, weights=self.weights)


def fit_problem(sets: Sequence[LayoutSet], step_time: StepTime = step_time_s) -> FitProblem:
    """Gathers what can be predicted of measured sources; another simulator's output is no evidence and is refused.

    Raises:
        InputError: A source that was not measured, or no row that can be predicted.
        InternalError: simtrain contradicts itself on a row.
    """
    rows: list[tuple[LayoutSet, LayoutRow]] = []
    refused = 0
    for dataset in sets:
        if dataset.evidence != "measured":
            raise InputError(f"{dataset.name} is another simulator's output: constants are fitted to measurements only")
        for row in dataset.rows:
            if row.outcome == "oom" or dataset.step_time_s(row) is None:
                continue
            try:
                step_time(dataset, row, {})
            except InternalError:
                raise
            except SimtrainError:
                refused += 1
                continue
            rows.append((dataset, row))
    if not rows:
        raise InputError(f"none of the rows can be predicted ({refused} refused)")
    return FitProblem(tuple(rows), refused, step_time)
