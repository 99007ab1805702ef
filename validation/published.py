"""Published throughput against predictions from data sheets alone, beside null models that know nothing but FLOPs.

Nothing is fitted to these rows: device numbers come from data sheets, constants of the device class from elsewhere.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from simtrain.core import catalog
from simtrain.core.precision import precision
from simtrain.core.runtime import runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.step.predict import schedule
from validation.errors import ErrorSummary, skill, summarise

DATASETS = ("bert_rtx3090",)
"""Shipped sets of published rows."""


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One measured throughput.

    Attributes:
        model: Catalog name.
        devices: How many.
        precision: Recipe that the run amounts to.
        printed_precision: What the source calls it.
        optimizer_style: Form of the optimizer, as `Runtime.optimizer_style`.
        micro_batch: Samples per device.
        sequences_per_s: Over all devices, as printed.
        file: In the source repository.
        line: In that file.
    """

    model: str
    devices: int
    precision: str
    printed_precision: str
    optimizer_style: str
    micro_batch: int
    sequences_per_s: float
    file: str
    line: int

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.model} x{self.devices} {self.printed_precision} b{self.micro_batch}"


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """Rows of one source.

    Attributes:
        title: One line.
        device: Catalog name.
        sequence: Sequence length.
        runtime: Name of the framework preset.
        fused_attention: Whether its attention was fused.
        optimizer: Of all rows.
        repository: Where the figures were read.
        commit: At which state.
        notes: What the source says.
        assumptions: What it does not say.
        variants_looked_at: Ways of predicting these rows that were tried with their errors in sight.
        clusters: Cluster by number of devices.
        rows: The figures.
    """

    title: str
    device: str
    sequence: int
    runtime: str
    fused_attention: bool
    optimizer: str
    repository: str
    commit: str
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]
    variants_looked_at: int
    clusters: dict[int, str]
    rows: tuple[PublishedRow, ...]


@dataclass(frozen=True, slots=True)
class PublishedComparison:
    """One row, predicted.

    Attributes:
        row: As published.
        predicted: Sequences per second, by the closed form.
        null_path: By one MFU per device and arithmetic path.
        null_device: By one MFU per device.
        without_overlap: Sequences per second if reductions did not overlap with the backward pass (not the prediction).
    """

    row: PublishedRow
    predicted: float
    null_path: float
    null_device: float
    without_overlap: float

    @property
    def error(self) -> float:
        """Relative error of throughput, with sign."""
        return self.predicted / self.row.sequences_per_s - 1


@dataclass(frozen=True, slots=True)
class PublishedReport:
    """A set of published rows, predicted.

    Attributes:
        dataset: The rows and their source.
        rows: One comparison each.
    """

    dataset: PublishedSet
    rows: tuple[PublishedComparison, ...]

    @property
    def errors(self) -> ErrorSummary:
        """Of the predictions."""
        return summarise([r.error for r in self.rows])

    @property
    def nulls(self) -> dict[str, ErrorSummary]:
        """Of the null models, by name."""
        return {
            "one MFU per device and arithmetic path": summarise([r.null_path / r.row.sequences_per_s - 1 for r in self.rows]),
            "one MFU per device": summarise([r.null_device / r.row.sequences_per_s - 1 for r in self.rows]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "title": self.dataset.title,
            "source": f"{self.dataset.repository} at {self.dataset.commit}",
            "assumptions": list(self.dataset.assumptions),
            "notes": list(self.dataset.notes),
            "summary": self.errors.to_dict() | {"variants_looked_at": self.dataset.variants_looked_at},
            "nulls": {name: null.to_dict() | {"skill": skill(self.errors, null)} for name, null in self.nulls.items()},
            "rows": [
                {
                    "name": r.row.name,
                    "source": f"{r.row.file} line {r.row.line}",
                    "measured_sequences_per_s": r.row.sequences_per_s,
                    "predicted_sequences_per_s": r.predicted,
                    "error": r.error,
                    "without_overlap_sequences_per_s": r.without_overlap,
                    "null_path_sequences_per_s": r.null_path,
                    "null_device_sequences_per_s": r.null_device,
                }
                for r in self.rows
            ],
        }

    def __str__(self) -> str:
        lines = [self.dataset.title, f"{'row':<30}{'measured':>10}{'predicted':>11}{'error':>8}{'null/path':>11}{'null/device':>13}"]
        lines += [
            f"{r.row.name:<30}{r.row.sequences_per_s:>10.0f}{r.predicted:>11.1f}{r.error:>+8.1%}"
            f"{r.null_path / r.row.sequences_per_s - 1:>+11.1%}{r.null_device / r.row.sequences_per_s - 1:>+13.1%}"
            for r in self.rows
        ]
        lines.append(f"predictions  {self.errors}")
        lines += [f"null: {name}  {null}; skill {skill(self.errors, null):.2f}" for name, null in self.nulls.items()]
        several = [r for r in self.rows if r.row.devices > 1]
        late = summarise([r.without_overlap / r.row.sequences_per_s - 1 for r in several])
        lines.append(f"what if reductions did not overlap (looked at after the fact, rows on several devices)  {late}")
        lines.append(f"variants looked at on these rows: {self.dataset.variants_looked_at}")
        lines.append(f"source: {self.dataset.repository} at {self.dataset.commit}")
        return "\n".join([*lines, *(f"assumed: {a}" for a in self.dataset.assumptions)])


def load(name: str = DATASETS[0]) -> PublishedSet:
    """Reads a shipped set of published rows."""
    data = tomllib.loads((files("validation") / "published" / f"{name}.toml").read_text())
    rows = tuple(PublishedRow(**row) for row in data.pop("row"))
    clusters = {int(count): text for count, text in data.pop("clusters").items()}
    notes, assumptions = tuple(data.pop("notes")), tuple(data.pop("assumptions"))
    return PublishedSet(**data, notes=notes, assumptions=assumptions, clusters=clusters, rows=rows)


def compare(dataset: PublishedSet) -> PublishedReport:
    """Predicts every row, and what two null models say.

    The null models get the median MFU of the rows themselves (model FLOPs over the dense peak of the arithmetic path): the best that one
    constant can do on these rows, although no constant of the prediction was fitted to them.
    """
    paths = sorted({r.precision for r in dataset.rows})
    by_path = {path: _median_mfu(dataset, [r for r in dataset.rows if r.precision == path]) for path in paths}
    overall = _median_mfu(dataset, dataset.rows)
    rows = tuple(
        PublishedComparison(
            row=row,
            predicted=predict(dataset, row),
            null_path=by_path[row.precision] / _seconds_at_peak(dataset, row),
            null_device=overall / _seconds_at_peak(dataset, row),
            without_overlap=predict(dataset, row, overlap=False),
        )
        for row in dataset.rows
    )
    return PublishedReport(dataset, rows)


def predict(dataset: PublishedSet, row: PublishedRow, *, overlap: bool = True) -> float:
    """Returns predicted sequences per second."""
    strategy = Strategy(data=row.devices, micro_batch=row.micro_batch, precision=row.precision, optimizer=dataset.optimizer)
    framework = runtime(dataset.runtime).with_(
        fused_attention=dataset.fused_attention, optimizer_style=row.optimizer_style, overlap_communication=overlap
    )
    return schedule(_workload(dataset, row), catalog.cluster(dataset.clusters[row.devices]), strategy, runtime=framework).samples_per_s


def _median_mfu(dataset: PublishedSet, rows: Sequence[PublishedRow]) -> float:
    return float(np.median([r.sequences_per_s * _seconds_at_peak(dataset, r) for r in rows]))


def compare_all(names: Sequence[str] = DATASETS) -> tuple[PublishedReport, ...]:
    """Predicts all shipped sets."""
    return tuple(compare(load(name)) for name in names)


def _workload(dataset: PublishedSet, row: PublishedRow) -> Workload:
    return catalog.workload(row.model, seq_len=dataset.sequence)


def _seconds_at_peak(dataset: PublishedSet, row: PublishedRow) -> float:
    """Seconds per sequence that model FLOPs would take at the dense peak of all devices: MFU is throughput times this."""
    peak = catalog.device(dataset.device).peak(precision(row.precision).arithmetic)
    return _workload(dataset, row).model_flops(1) / (peak * row.devices)
