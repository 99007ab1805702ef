"""Published throughput against predictions from data sheets alone, beside null models that know nothing but FLOPs.

Nothing is fitted to these rows: device numbers come from data sheets, constants of the device class from elsewhere.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

import numpy as np

from simtrain.core import catalog
from simtrain.core.precision import precision
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.step.predict import schedule
from validation.errors import ErrorSummary, skill, summarise

DATASETS = ("bert_rtx3090", "resnet50_single_gpu", "resnet50_dgx", "timm_rtx3090")
"""Shipped sets of published rows."""


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One measured throughput.

    Attributes:
        model: Catalog name.
        device: Catalog name.
        devices: How many.
        precision: Recipe that the run amounts to.
        printed_precision: What the source calls it.
        optimizer_style: Form of the optimizer, as `Update.optimizer_style`.
        micro_batch: Samples per device.
        samples_per_s: Over all devices, as printed.
        file: In the source repository.
        line: In that file.
        options: Of the workload.
        several_devices: Whether its set is of several kinds of devices.
        accumulation: Micro-batches per step.
    """

    model: str
    device: str
    devices: int
    precision: str
    printed_precision: str
    optimizer_style: str
    micro_batch: int
    samples_per_s: float
    file: str
    line: int
    options: Mapping[str, Any] = field(default_factory=dict)
    several_devices: bool = False
    accumulation: int = 1

    @property
    def name(self) -> str:
        """For reports."""
        where = f" {self.device}" if self.several_devices else ""
        options = "".join(f" {name}" for name, value in self.options.items() if value is True)
        return f"{self.model}{where} x{self.devices} {self.printed_precision} b{self.micro_batch}{options}"


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """Rows of one source.

    Attributes:
        title: One line.
        sequence: Sequence length; `None` for images.
        runtime: Name of the framework preset.
        fused_attention: Whether its attention was fused.
        optimizer: Of all rows.
        repository: Where the figures were read.
        commit: At which state.
        notes: What the source says.
        assumptions: What it does not say.
        variants_looked_at: Ways of predicting these rows that were tried with their errors in sight.
        clusters: Cluster by number of devices, where it is more than the devices.
        rows: The figures.
    """

    title: str
    sequence: int | None
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
        predicted: Samples per second, by the closed form.
        null_path: By one MFU per arithmetic path (and device, where the set has several rows for each).
        null_device: By one MFU per device.
        without_overlap: Samples per second if reductions did not overlap with the backward pass (not the prediction).
    """

    row: PublishedRow
    predicted: float
    null_path: float
    null_device: float
    without_overlap: float

    @property
    def error(self) -> float:
        """Relative error of throughput, with sign."""
        return self.predicted / self.row.samples_per_s - 1


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
        several = any(r.row.several_devices for r in self.rows)
        path, device = (
            ("one MFU per arithmetic path", "one MFU") if several else ("one MFU per device and arithmetic path", "one MFU per device")
        )
        found = {device: summarise([r.null_device / r.row.samples_per_s - 1 for r in self.rows])}
        if len(_by_path(self.dataset)) > 1:
            found = {path: summarise([r.null_path / r.row.samples_per_s - 1 for r in self.rows])} | found
        return found

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
                    "measured_samples_per_s": r.row.samples_per_s,
                    "predicted_samples_per_s": r.predicted,
                    "error": r.error,
                    "without_overlap_samples_per_s": r.without_overlap,
                    "null_path_samples_per_s": r.null_path,
                    "null_device_samples_per_s": r.null_device,
                }
                for r in self.rows
            ],
        }

    def __str__(self) -> str:
        width = max(30, *(len(r.row.name) + 1 for r in self.rows))
        lines = [self.dataset.title, f"{'row':<{width}}{'measured':>10}{'predicted':>11}{'error':>8}{'null/path':>11}{'null/device':>13}"]
        lines += [
            f"{r.row.name:<{width}}{r.row.samples_per_s:>10.0f}{r.predicted:>11.1f}{r.error:>+8.1%}"
            f"{r.null_path / r.row.samples_per_s - 1:>+11.1%}{r.null_device / r.row.samples_per_s - 1:>+13.1%}"
            for r in self.rows
        ]
        lines.append(f"predictions  {self.errors}")
        lines += [f"null: {name}  {null}; skill {skill(self.errors, null):.2f}" for name, null in self.nulls.items()]
        if several := [r for r in self.rows if r.row.devices > 1]:
            late = summarise([r.without_overlap / r.row.samples_per_s - 1 for r in several])
            lines.append(f"what if reductions did not overlap (looked at after the fact, rows on several devices)  {late}")
        lines.append(f"variants looked at on these rows: {self.dataset.variants_looked_at}")
        lines.append(f"source: {self.dataset.repository} at {self.dataset.commit}")
        return "\n".join([*lines, *(f"assumed: {a}" for a in self.dataset.assumptions)])


def load(name: str = DATASETS[0]) -> PublishedSet:
    """Reads a shipped set of published rows."""
    data = tomllib.loads((files("validation") / "published" / f"{name}.toml").read_text())
    common = {field: data.pop(field) for field in ("model", "device", "devices", "precision", "optimizer_style") if field in data}
    rows = tuple(PublishedRow(**common | row) for row in data.pop("row"))
    several = len({row.device for row in rows}) > 1
    rows = tuple(replace(row, several_devices=several) for row in rows)
    clusters = {int(count): text for count, text in data.pop("clusters", {}).items()}
    data.setdefault("sequence", None)
    notes, assumptions = tuple(data.pop("notes")), tuple(data.pop("assumptions"))
    return PublishedSet(**data, notes=notes, assumptions=assumptions, clusters=clusters, rows=rows)


def compare(dataset: PublishedSet) -> PublishedReport:
    """Predicts every row, and what two null models say.

    The null models get the median MFU of the rows themselves (model FLOPs over the dense peak of the arithmetic path): the best that one
    constant can do on these rows, although no constant of the prediction was fitted to them.
    """
    by_path = {path: _median_mfu(dataset, rows) for path, rows in _by_path(dataset).items()}
    overall = _median_mfu(dataset, dataset.rows)
    rows = tuple(
        PublishedComparison(
            row=row,
            predicted=predict(dataset, row),
            null_path=by_path[_path(dataset, row)] / _seconds_at_peak(row, dataset.sequence),
            null_device=overall / _seconds_at_peak(row, dataset.sequence),
            without_overlap=predict(dataset, row, overlap=False),
        )
        for row in dataset.rows
    )
    return PublishedReport(dataset, rows)


def predict(dataset: PublishedSet, row: PublishedRow, *, overlap: bool = True) -> float:
    """Returns predicted samples per second."""
    strategy = Strategy(
        data=row.devices,
        micro_batch=row.micro_batch,
        accumulation=row.accumulation,
        precision=row.precision,
        optimizer=dataset.optimizer,
    )
    framework = runtime(dataset.runtime).with_(
        fused_attention=dataset.fused_attention, optimizer_style=row.optimizer_style, overlap_communication=overlap
    )
    cluster = catalog.cluster(dataset.clusters.get(row.devices, f"{row.devices}x {row.device}"))
    return schedule(_workload(row, dataset.sequence), cluster, strategy, runtime=framework).samples_per_s


def _path(dataset: PublishedSet, row: PublishedRow) -> tuple[str, ...]:
    """What shares one constant: device and arithmetic path; the path alone where no device has two rows for one path."""
    keys = [(r.device, r.precision) for r in dataset.rows]
    return (row.device, row.precision) if len(set(keys)) < len(keys) else (row.precision,)


def _by_path(dataset: PublishedSet) -> dict[tuple[str, ...], list[PublishedRow]]:
    groups: dict[tuple[str, ...], list[PublishedRow]] = {}
    for row in dataset.rows:
        groups.setdefault(_path(dataset, row), []).append(row)
    return groups


def _median_mfu(dataset: PublishedSet, rows: Sequence[PublishedRow]) -> float:
    return float(np.median([r.samples_per_s * _seconds_at_peak(r, dataset.sequence) for r in rows]))


def compare_all(names: Sequence[str] = DATASETS) -> tuple[PublishedReport, ...]:
    """Predicts all shipped sets."""
    return tuple(compare(load(name)) for name in names)


def _workload(row: PublishedRow, sequence: int | None) -> Workload:
    return catalog.workload(row.model, seq_len=sequence, **row.options)


def _seconds_at_peak(row: PublishedRow, sequence: int | None) -> float:
    """Seconds per sample that model FLOPs would take at the dense peak of all devices: MFU is throughput times this."""
    peak = catalog.device(row.device).peak(precision(row.precision).arithmetic)
    return _workload(row, sequence).model_flops(1) / (peak * row.devices)
