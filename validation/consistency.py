"""Do a published row's own columns agree? Sizes, throughput, TFLOP/s and MFU that sources print beside a time, against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simtrain.core.errors import SimtrainError
from validation.layout_rows import LayoutRow
from validation.layouts import LayoutSet, mpt_flops, narayanan_flops

TOLERANCE = 0.02
"""Relative difference above which two columns contradict each other; printed figures have two to four digits."""
SIZE_TOLERANCE = 0.03
"""The same for model sizes, which are often named by a rounded figure (GPT-1.7B has 1.65e9 parameters)."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two columns of a row that cannot both be right.

    Attributes:
        row: As published.
        quantity: What the source prints.
        printed: Its figure.
        computed: The same from the row's other columns.
    """

    row: LayoutRow
    quantity: str
    printed: float
    computed: float

    @property
    def difference(self) -> float:
        """Computed over printed, minus one."""
        return self.computed / self.printed - 1


def contradictions(dataset: LayoutSet) -> tuple[Contradiction, ...]:
    """Returns what does not agree in a source; rows whose model cannot be built are checked as far as they need none."""
    found = [c for row in dataset.rows for c in _checks(dataset, row)]
    limits = {"parameters": SIZE_TOLERANCE}
    return tuple(c for c in found if abs(c.difference) > limits.get(c.quantity, TOLERANCE))


def _checks(dataset: LayoutSet, row: LayoutRow) -> Iterator[Contradiction]:
    time_s = dataset.step_time_s(row)
    if row.step_time_s and row.tokens_per_s:
        yield Contradiction(row, "tokens/s", row.tokens_per_s, row.global_batch * row.sequence / row.step_time_s)
    try:
        workload, at_peak_s = dataset.workload(row), dataset.seconds_at_peak(row)
    except SimtrainError:
        return
    if size := dataset.models[row.model].get("published_parameters"):
        yield Contradiction(row, "parameters", size, workload.parameter_count)
    if time_s is None:
        return
    if row.reported_mfu:
        yield Contradiction(row, "MFU", row.reported_mfu, at_peak_s / time_s * _convention(dataset, row))
    if row.reported_tflops and dataset.flops != "none":
        yield Contradiction(row, "TFLOP/s", row.reported_tflops, _flops(dataset, row) / time_s / row.devices / 1e12)


def _flops(dataset: LayoutSet, row: LayoutRow) -> float:
    """FLOPs of a step by the source's own formula."""
    if dataset.flops == "mpt":
        return mpt_flops(dataset, row)
    return narayanan_flops(dataset, row, blocks_alone="older TFLOPs" in row.where)


def _convention(dataset: LayoutSet, row: LayoutRow) -> float:
    """FLOPs that the source's MFU counts, over the model FLOPs of the workload."""
    return mpt_flops(dataset, row) / dataset.workload(row).model_flops(row.global_batch) if dataset.flops == "mpt" else 1.0
