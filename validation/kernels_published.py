"""Published times of kernels and of one device's passes against the device models, beside a flat roofline and one fitted constant.

Three kinds of rows: matrix products (`matrix_products.toml`), forward and backward passes of language models on single GPUs
(`neusight_models.toml`), and transformers on TPU slices (`tpu_transformers.toml`), of which only the chip's own time is predicted: what
sharding and the torus add is not, so that a prediction must not be slower than the measurement.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from simtrain.core import catalog
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType, precision
from simtrain.core.runtimes import runtime
from simtrain.core.workload import OperatorKind, Window, Workload
from simtrain.cost.roofline import roofline_s
from simtrain.step.kernels import layer_kernels
from validation.errors import ErrorSummary, skill, summarise
from validation.published import load

FITTED_SETS = ("bert_single_gpu", "resnet50_workstation_gpu")
"""Sets of whole steps on one GPU that constants of the GPU model were fitted on: what is left of their errors is no prediction."""

HELD_OUT_SETS = ("bert_dgx",)
"""Sets of whole steps on one GPU that no constant was fitted on."""

FORWARDS = {"full": 2, "none": 1}
"""Forward passes of a step by what is recomputed, where the source's word says it exactly."""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One measured time and what was said about it.

    Attributes:
        name: For reports.
        device: Where.
        path: What shares a constant in the null models: the arithmetic, or what was run.
        measured_s: As published.
        predicted_s: By the device's compute model.
        flat_s: By the larger of arithmetic at the peak and traffic at the peak.
        ideal_s: Arithmetic at the peak, which the null models scale by one constant.
    """

    name: str
    device: str
    path: str
    measured_s: float
    predicted_s: float
    flat_s: float
    ideal_s: float


@dataclass(frozen=True, slots=True)
class KernelReport:
    """Rows of one table, predicted. Errors are of rates: predicted over measured, less one.

    Attributes:
        title: One line.
        source: Where the figures were read.
        notes: What the reader must know.
        rows: One comparison each.
        print_rows: Whether the text lists every row.
    """

    title: str
    source: str
    notes: tuple[str, ...]
    rows: tuple[KernelRow, ...]
    print_rows: bool = True

    @property
    def errors(self) -> ErrorSummary:
        """Of the predictions."""
        return summarise([r.measured_s / r.predicted_s - 1 for r in self.rows])

    @property
    def nulls(self) -> dict[str, ErrorSummary]:
        """Of the flat roofline; of the median share of the peak on the other devices; and of the median share on the device itself.

        The last has seen the very rows that it is judged by, and stands only where a device has several rows.
        """
        found = {"flat roofline": summarise([r.measured_s / r.flat_s - 1 for r in self.rows])}
        if len({r.device for r in self.rows}) > 1:
            found["one share of the peak per path, from the other devices"] = self._null(own=False)
        if any(summary.count > 1 for summary in self.by_device().values()):
            found["one share of the peak per path and device, from these rows"] = self._null(own=True)
        return found

    def _null(self, *, own: bool) -> ErrorSummary:
        errors = []
        for row in self.rows:
            near = [r for r in self.rows if (r.device == row.device) == own and r.path == row.path]
            near = near or [r for r in self.rows if (r.device == row.device) == own]
            share = float(np.median([r.ideal_s / r.measured_s for r in near]))
            errors.append(row.measured_s * share / row.ideal_s - 1)
        return summarise(errors)

    @property
    def left_out(self) -> dict[str, ErrorSummary]:
        """Of each device by one factor per path that the other devices gave, for the predictions and for the flat roofline.

        What a device's own rows say is left out, so that both are judged as on a device that nobody has measured; empty for one device.
        """
        if len({r.device for r in self.rows}) < 2:
            return {}
        named = {"predictions": lambda r: r.predicted_s, "flat roofline": lambda r: r.flat_s}
        return {name: summarise([self._scaled(row, time_s) for row in self.rows]) for name, time_s in named.items()}

    def _scaled(self, row: KernelRow, time_s: Callable[[KernelRow], float]) -> float:
        others = [r for r in self.rows if r.device != row.device]
        near = [r for r in others if r.path == row.path] or others
        return row.measured_s / (time_s(row) * float(np.median([r.measured_s / time_s(r) for r in near]))) - 1

    def by_device(self) -> dict[str, ErrorSummary]:
        """Errors of the predictions for each device and path."""
        groups = dict.fromkeys((r.device, r.path) for r in self.rows)
        return {
            f"{device} {path}": summarise([r.measured_s / r.predicted_s - 1 for r in self.rows if (r.device, r.path) == (device, path)])
            for device, path in groups
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "title": self.title,
            "source": self.source,
            "notes": list(self.notes),
            "summary": self.errors.to_dict(),
            "nulls": {name: null.to_dict() | {"skill": skill(self.errors, null)} for name, null in self.nulls.items()},
            "left_out": {name: summary.to_dict() for name, summary in self.left_out.items()},
            "devices": {name: summary.to_dict() for name, summary in self.by_device().items()},
            "rows": [
                {
                    "name": r.name,
                    "device": r.device,
                    "path": r.path,
                    "measured_s": r.measured_s,
                    "predicted_s": r.predicted_s,
                    "flat_s": r.flat_s,
                }
                for r in self.rows
            ],
        }

    def __str__(self) -> str:
        lines = [self.title]
        if self.print_rows:
            width = max(len(r.name) for r in self.rows) + 1
            lines.append(f"{'row':<{width}}{'measured ms':>13}{'predicted ms':>14}{'error':>8}{'flat':>9}")
            lines += [
                f"{r.name:<{width}}{r.measured_s * 1e3:>13.4g}{r.predicted_s * 1e3:>14.4g}{r.measured_s / r.predicted_s - 1:>+8.1%}"
                f"{r.measured_s / r.flat_s - 1:>+9.1%}"
                for r in self.rows
            ]
        lines += [f"{name:<26}{summary}" for name, summary in self.by_device().items() if summary.count > 1]
        lines.append(f"predictions  {self.errors}")
        lines += [f"null: {name}  {null}; skill {skill(self.errors, null):.2f}" for name, null in self.nulls.items()]
        lines += [f"each device left out, one factor per path from the others: {name}  {errors}" for name, errors in self.left_out.items()]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes), f"source: {self.source}"])


def compare_kernels() -> tuple[KernelReport, ...]:
    """Predicts all shipped tables."""
    return (*_matrix_products(), convolutions(), _language_models(), image_models(), _tpu_chips())


def _matrix_products() -> tuple[KernelReport, KernelReport, KernelReport]:
    """Best shapes of many devices, squares at several board powers, and the shapes of DeepBench."""
    data = load_table("matrix_products")
    best = data["best"][0]
    first = KernelReport(
        "Best matrix products of single devices (16 and 8 bits)",
        f"{best['repository']} {best['file']} at {best['commit']}",
        (*best["notes"], "The power cap of tensor cores and the share of AMD devices were fitted with these rows in sight."),
        tuple(
            _product(device, path, (m, n, k), 2.0 * m * n * k / (tflops * 1e12), f"{device} {path} {m}x{n}x{k}")
            for device, path, m, n, k, tflops in best["rows"]
        ),
    )
    square = data["square"][0]
    second = KernelReport(
        "Square matrix products at several board powers (16 bits)",
        f"{square['repository']}, {square['file']}",
        tuple(square["notes"]),
        tuple(
            _product(device, path, (n, n, n), 2.0 * n**3 / (tflops * 1e12), f"{device} {path} {n}x{n}x{n}")
            for device, path, n, tflops in square["rows"]
        ),
    )
    sweeps = data["sweep"]
    rows = tuple(
        _product(s["device"], s["path"], (m, n, k), ms * 1e-3, f"{s['device']} {s['path']} {m}x{n}x{k}")
        for s in sweeps
        for m, n, k, ms in s["rows"]
    )
    note = "Single timed calls of 2017 libraries: a host floor of some microseconds is in the measurement and not in the prediction."
    source = f"{sweeps[0]['repository']} at {sweeps[0]['commit']}"
    return first, second, KernelReport("DeepBench matrix products on V100 and P100", source, (note,), rows, print_rows=False)


def convolutions() -> KernelReport:
    """Convolutions and their gradients on a V100, with and without tensor cores."""
    data = load_table("convolutions")
    gpu = catalog.device(data["device"])
    model = catalog.compute_model(gpu.compute_model)
    rows = []
    for width, height, channels, batch, filters, edge, pad_width, pad_height, stride, *times_ms in data["rows"]:
        pixels = ((width + 2 * pad_width - edge) // stride + 1) * ((height + 2 * pad_height - edge) // stride + 1)
        m, n, k = float(batch * pixels), float(filters), float(channels * edge**2)
        image = float(batch * channels * width * height)
        for i, path in enumerate((DType.FP32, DType.FP16)):
            forward_ms, to_filter_ms, to_input_ms = times_ms[3 * i : 3 * i + 3]
            for products, measured_ms in ((1, forward_ms), (2, to_filter_ms + to_input_ms)):
                kernel = _convolution(path, (m, n, k, image), Window(edge, stride), products)
                what = f"{path} {'forward' if products == 1 else 'backward'}"
                name = f"{width}x{height}x{channels} b{batch} {filters} filters of {edge} {what}"
                predicted = float(model.kernel_times_s(gpu, kernel)[0])
                flat, ideal = float(_flat_s(gpu, kernel)[0]), float(kernel.flops[0]) / gpu.peak(path)
                rows.append(KernelRow(name, data["device"], what, measured_ms * 1e-3, predicted, flat, ideal))
    source = f"{data['repository']} {data['file']} at {data['commit']}"
    return KernelReport("DeepBench convolutions on a V100", source, tuple(data["notes"]), tuple(rows), print_rows=False)


def _convolution(path: DType, sizes: tuple[float, float, float, float], window: Window, products: int) -> KernelBatch:
    """A convolution (one product), or the gradients of its filter and its image (two)."""
    m, n, k, image = sizes
    one = np.ones(1)
    return KernelBatch(
        names=("convolution",),
        kinds=(OperatorKind.CONVOLUTION if products == 1 else OperatorKind.CONVOLUTION_BACKWARD,),
        batch=one,
        m=one * m,
        n=one * n,
        k=one * k,
        flops=one * 2.0 * m * n * k * products,
        bytes_moved=one * path.size_bytes * products * (image + m * n + k * n),
        element_bytes=one * path.size_bytes,
        launches=np.full(1, products),
        causal=np.zeros(1, dtype=bool),
        arithmetic=path,
        windows=(window,),
    )


def _language_models() -> KernelReport:
    """Forward and backward passes of BERT and GPT-2 on single GPUs in fp32: sums over kernels."""
    data = load_table("neusight_models")
    rows = []
    for device, model, tokens, batch, forward_ms, backward_ms in data["rows"]:
        options = {"dropout": 0.0} if model.startswith("bert") and not backward_ms else {}
        work = catalog.workload(model, seq_len=tokens, **options)
        gpu = catalog.device(device)
        what = "training" if backward_ms else "inference"
        predicted, flat, ideal = _passes(gpu, work, batch, "fp32", forwards=1, backwards=int(backward_ms > 0))
        rows.append(
            KernelRow(f"{device} {model} {what} {tokens} b{batch}", device, what, (forward_ms + backward_ms) / 1e3, predicted, flat, ideal)
        )
    note = "Kernel times without host or optimizer; constants for fp32 were fitted on kernels of these devices, not on these rows."
    return KernelReport("Forward and backward passes in fp32 on single GPUs", data["repository"], (*data["notes"], note), tuple(rows))


def image_models() -> KernelReport:
    """Forward and backward passes of ResNets and vision transformers on an RTX 3090, which no constant was fitted on."""
    dataset = load("timm_rtx3090")
    rows = []
    for row in dataset.rows:
        work = catalog.workload(row.model, **row.options)
        gpu = catalog.device(row.device)
        predicted, flat, ideal = _passes(gpu, work, row.micro_batch, row.precision, forwards=1, backwards=1)
        path = "vit" if row.model.startswith("vit") else "resnet"
        rows.append(KernelRow(row.name, row.device, path, row.micro_batch / row.samples_per_s, predicted, flat, ideal))
    note = "Kernel times without host and optimizer, which take below 2 % of these steps; whole steps: simtrain validate published."
    source = f"{dataset.repository} at {dataset.commit}"
    return KernelReport("ResNets and vision transformers on one RTX 3090, in 16 bits", source, (note,), tuple(rows))


def _tpu_chips() -> KernelReport:
    """One chip's own time in steps of sharded transformers on TPU slices, where what is recomputed and the chip's share are known."""
    data = load_table("tpu_transformers")
    rows = []
    for row in data["row"]:
        if row["recompute"] not in FORWARDS or row["tensor"] != 1:
            continue
        chip, work = catalog.device(row["device"]), tpu_workload(row)
        batch = row["micro_batch"]
        flops = work.model_flops(batch)
        predicted, flat, ideal = _passes(chip, work, batch, "bf16-amp", forwards=FORWARDS[row["recompute"]], backwards=1)
        name = f"{row['device']} x{row['chips']} {row['layers']}x{row['hidden']} b{batch}"
        rows.append(KernelRow(name, row["device"], "bf16", flops / (row["tflops_per_chip"] * 1e12), predicted, flat, ideal))
    notes = (
        "Only the chip's own kernels: what sharding over the slice and the optimizer cost is left out and shows as a positive error.",
        "No constant of the systolic model was fitted to any row.",
    )
    return KernelReport(
        "Transformers on TPU slices: the chip's own time", "https://github.com/AI-Hypercomputer/maxtext", notes, tuple(rows)
    )


def tpu_workload(row: Mapping[str, Any]) -> Workload:
    """Builds the transformer of a row of `tpu_transformers.toml`; heads of 128, as in the configurations it names."""
    family = "llama" if row["gated"] else "gpt"
    return catalog.workload(
        family,
        seq_len=row["tokens"],
        layers=row["layers"],
        hidden=row["hidden"],
        heads=row["heads"],
        kv_heads=row["kv_heads"],
        head_dim=row["hidden"] // row["heads"] if not row["gated"] else 128,
        ffn=row["ffn"],
        vocabulary=row["vocabulary"],
        max_positions=row["tokens"],
    )


def _product(device: str, path: str, shape: tuple[int, int, int], measured_s: float, name: str) -> KernelRow:
    found, dtype = catalog.device(device), DType(path)
    m, n, k = shape
    width = dtype.size_bytes
    # fp8 products write 16-bit results
    moved = width * (m * k + k * n) + max(width, 2) * m * n
    one = np.ones(1)
    batch = KernelBatch(
        names=(name,),
        kinds=(OperatorKind.GEMM,),
        batch=one,
        m=one * m,
        n=one * n,
        k=one * k,
        flops=one * 2 * m * n * k,
        bytes_moved=one * moved,
        element_bytes=one * width,
        launches=np.ones(1, dtype=np.int64),
        causal=np.zeros(1, dtype=bool),
        arithmetic=dtype,
    )
    predicted = float(catalog.compute_model(found.compute_model).kernel_times_s(found, batch)[0])
    return KernelRow(name, device, path, measured_s, predicted, float(_flat_s(found, batch)[0]), 2.0 * m * n * k / found.peak(dtype))


def _passes(device: Device, work: Workload, batch: int, recipe: str, *, forwards: int, backwards: int) -> tuple[float, float, float]:
    """Sums of kernel times: by the device's model, by a flat roofline, and model FLOPs at the peak."""
    form, framework = precision(recipe), runtime("torch-eager").with_(fused_attention=device.device_class == "systolic")
    model = catalog.compute_model(device.compute_model)
    predicted = flat = 0.0
    for layer in work.layers:
        passes = layer_kernels(layer, batch, work.sequence, form, framework)
        for kernels, times in zip(passes, (forwards, backwards), strict=True):
            if times and len(kernels):
                predicted += layer.repeats * times * float(model.kernel_times_s(device, kernels).sum())
                flat += layer.repeats * times * float(_flat_s(device, kernels).sum())
    ideal = work.model_flops(batch) / device.peak(form.arithmetic)
    return predicted, flat, ideal if backwards else ideal / 3


def _flat_s(device: Device, kernels: KernelBatch) -> FloatArray:
    return roofline_s(kernels.flops, kernels.bytes_moved, device.peak(kernels.arithmetic), device.memory.bandwidth_bytes_per_s)


def load_table(name: str) -> dict[str, Any]:
    """Reads a table of `validation/published`."""
    return tomllib.loads((files("validation") / "published" / f"{name}.toml").read_text())
