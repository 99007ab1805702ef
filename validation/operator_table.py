"""The operator table of a machine: operators of measured steps, timed where they ran, beside what the formula of their class gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hardware_models.cpu import bytes_done, calls_done, flops_done, kernel_class
from hardware_models.operator_table import COLUMNS, coordinates
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import precision
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import OperatorKind, Workload
from simtrain.step.kernels import layer_kernels, optimizer_kernels

Table = Mapping[str, tuple[tuple[float, ...], ...]]
"""By class and path, entries of `hardware_models.operator_table`."""


class Cost(Protocol):
    """What a class of operators costs."""

    def seconds(self, *args: Any, **kwargs: Any) -> float:
        """Returns the time of some work: one number for each column of the formula."""


@dataclass(frozen=True, slots=True)
class Formula:
    """How a kind of device sees kernels.

    Attributes:
        kernel_class: Class of an operator.
        work: What kernels do, shape (kernels, columns): what `Cost.seconds` takes.
    """

    kernel_class: Callable[[OperatorKind, str], str]
    work: Callable[[KernelBatch], FloatArray]


def _cpu_work(kernels: KernelBatch) -> FloatArray:
    return np.column_stack([calls_done(kernels), flops_done(kernels), bytes_done(kernels)])


CPU_FORMULA = Formula(kernel_class, _cpu_work)
"""Pieces of work, FLOPs and bytes."""


@dataclass(frozen=True, slots=True)
class Operators:
    """What one micro-batch asks of a class, operator by operator in program order.

    Attributes:
        points: Coordinates in the table, shape (operators, 5).
        work: What the formula counts, one row for each operator.
    """

    points: FloatArray
    work: FloatArray


def operators_of(work: Workload, strategy: Strategy, runtime_name: str, formula: Formula = CPU_FORMULA) -> dict[str, Operators]:
    """Lists the operators of a micro-batch by class, forward and backward without recomputation.

    Args:
        work: Of the model.
        strategy: Micro-batch and precision.
        runtime_name: Decides between fused and unfused operators.
        formula: Of the kind of device.
    """
    points: dict[str, list[FloatArray]] = {}
    counts: dict[str, list[FloatArray]] = {}
    for kernels in kernels_in_order(work, strategy, runtime_name):
        where = coordinates(kernels)
        rows = formula.work(kernels)
        for i, (kind, operator) in enumerate(zip(kernels.kinds, kernels.names, strict=True)):
            name = formula.kernel_class(kind, operator)
            points.setdefault(name, []).append(where[i])
            counts.setdefault(name, []).append(rows[i])
    return {name: Operators(np.array(points[name]), np.array(counts[name])) for name in points}


def update_of(work: Workload, strategy: Strategy, runtime_name: str, formula: Formula = CPU_FORMULA) -> Operators:
    """Returns the optimizer's update, which is timed as a whole."""
    kernels = update_kernels(work, strategy, runtime_name)
    return Operators(coordinates(kernels), formula.work(kernels))


def update_kernels(work: Workload, strategy: Strategy, runtime_name: str) -> KernelBatch:
    """Returns the kernels of the optimizer's update."""
    sizes = [p.elements for layer in work for p in layer.parameters if p.tied_to is None]
    return optimizer_kernels(sizes, strategy.optimizer, precision(strategy.precision), runtime(runtime_name))


def kernels_in_order(work: Workload, strategy: Strategy, runtime_name: str) -> Iterator[KernelBatch]:
    """Yields the kernels of every pass of a micro-batch in program order, repeated layers one by one; see `operators_of`."""
    recipe, runs_on = precision(strategy.precision), runtime(runtime_name)
    passes = [(layer_kernels(layer, strategy.micro_batch, work.sequence, recipe, runs_on), layer.repeats) for layer in work.layers]
    for (forward, _), repeats in passes:
        yield from [forward] * repeats
    for (_, backward), repeats in reversed(passes):
        yield from [backward] * repeats


def entries(
    operators: Mapping[str, Operators],
    call_times_s: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    outside_s: float,
    totals_s: Mapping[str, float] | None = None,
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Puts the operators of one measured step beside the formula; equal ones are one entry.

    Args:
        operators: What the step asked for.
        call_times_s: Time of every operator call by class, in program order. Classes where PyTorch makes another number of calls than
            the closed form lists cannot be told apart operator by operator.
        costs: Formula of each class, the time outside operators included.
        outside_s: That time, per operator.
        totals_s: Time of each class; the share of it that the formula gives an operator stands for its own in classes that cannot be
            told apart. Without it they are left out.
    """
    table: dict[str, tuple[tuple[float, ...], ...]] = {}
    for name, asked in operators.items():
        times = np.array(call_times_s.get(name, ()))
        if name not in costs:
            continue
        if len(times) != len(asked.work):
            if not (totals_s or {}).get(name):
                continue
            shares = np.array([costs[name].seconds(*row) for row in asked.work])
            times = shares * (((totals_s or {})[name] + outside_s * len(shares)) / shares.sum()) - outside_s
        different, place = np.unique(np.column_stack([asked.points, asked.work]).round(9), axis=0, return_inverse=True)
        measured = np.bincount(place.ravel(), times + outside_s) / np.bincount(place.ravel())
        modelled = np.array([costs[name].seconds(*row) for row in different[:, COLUMNS - 1 :]])
        ratio = np.log(np.maximum(measured, 1e-9) / np.maximum(modelled, 1e-9))
        rows = np.column_stack([different[:, : COLUMNS - 1], ratio]).round(4)
        table[name] = tuple(tuple(row) for row in rows.tolist())
    return table


def merged(*tables: Table) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Returns the entries of several tables."""
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: tuple(row for table in tables for row in table.get(name, ())) for name in names}
