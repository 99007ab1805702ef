"""The CPU compute model: launch cost, arithmetic and traffic of each class of operator, added up.

The three terms are added because one core overlaps them little, and because a sum is linear in its constants: calibration on the
machine itself fits them by least squares and writes them into the device's `[profile]` as `<class>.launch_s`, `<class>.flops_per_s`
and `<class>.bytes_per_s`. Rates of arithmetic hold for fp32; a path of its own is written `<class>.flops_per_s.bf16`, and without it
the fp32 rate is scaled by the ratio of the peaks. Without a profile, shares of the data sheet stand in.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simtrain.core.errors import CatalogError, nearest
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind
from simtrain.cost.roofline import triangle_share

CLASSES = (
    "gemm",
    "batched_gemm",
    "attention",
    "attention_backward",
    "elementwise",
    "norm",
    "norm_backward",
    "softmax",
    "softmax_backward",
    "reduction",
    "embedding",
    "embedding_backward",
    "optimizer",
)
"""Classes of operators that share constants, in the order calibration lists them."""

TERMS = ("launch_s", "flops_per_s", "bytes_per_s")
"""Constants of each class."""

_SHARED = {OperatorKind.CAST: "elementwise", OperatorKind.COPY: "elementwise"}

DATA_SHEET_LAUNCH_S = 5e-6
"""Assumption: an operator call of PyTorch on a CPU without work to do; about 3 us were measured on one server core."""

DATA_SHEET_FLOPS: Mapping[str, float] = {"gemm": 0.9, "batched_gemm": 0.7, "attention": 0.5, "attention_backward": 0.4}
"""Assumption: share of the peak by class; classes not named do no matrix products, and 0.25 stands for their vector arithmetic."""

DATA_SHEET_BYTES: Mapping[str, float] = {"softmax": 0.3, "softmax_backward": 0.4, "norm": 0.5, "norm_backward": 0.4, "embedding": 0.4}
"""Assumption: share of the memory bandwidth by class; 0.7 for classes not named. Exponentials and row sums cost more than traffic."""

SOURCE = "PyTorch on one pinned server core: launch about 3 us, copies 21 to 35 GB/s; shares of the data sheet by class are assumptions"


def kernel_class(kind: OperatorKind) -> str:
    """Returns the class of operators, one of `CLASSES`, whose constants price a kind."""
    return _SHARED.get(kind, kind.value)


class CpuModel:
    """Prices kernels on CPUs; see the module's description.

    Attributes:
        name: As devices name it in `compute_model`.
    """

    name = "cpu"

    def kernel_times_s(self, device: Device, kernels: KernelBatch) -> FloatArray:
        """Returns the time of each kernel.

        Raises:
            UnsupportedError: The device lacks the arithmetic path.
            CatalogError: The profile names a constant that does not exist.
        """
        _check(device)
        kinds = tuple(dict.fromkeys(kernels.kinds))
        index = np.array([kinds.index(kind) for kind in kernels.kinds], dtype=np.intp)
        table = np.array([class_constants(device, kernel_class(kind), kernels.arithmetic) for kind in kinds]).reshape(-1, 3)
        launch_s, flops_per_s, bytes_per_s = table[index].T
        return np.asarray(kernels.launches * launch_s + flops_done(kernels) / flops_per_s + kernels.bytes_moved / bytes_per_s)

    def sources(self, device: Device) -> tuple[str, ...]:
        """Returns what the constants rest on."""
        calibrated = sorted({name.split(".")[0] for name in device.profile})
        own = (f"{device.name}: measured on the machine itself: {', '.join(calibrated)}",) if calibrated else ()
        return own if len(calibrated) == len(CLASSES) else (*own, SOURCE)


def flops_done(kernels: KernelBatch) -> FloatArray:
    """Operations that are carried out: the CPU's flash kernel skips blocks above the diagonal of causal attention."""
    return np.where(kernels.causal, kernels.flops * triangle_share(np.maximum(kernels.n, 1.0)), kernels.flops)


def class_constants(device: Device, name: str, arithmetic: DType) -> tuple[float, float, float]:
    """Returns launch time, FLOP/s and bytes/s of a class: from the device's profile, else from its data sheet.

    Raises:
        UnsupportedError: The device lacks the arithmetic path.
    """
    peak = device.peak(arithmetic)
    profile = device.profile
    flops = profile.get(f"{name}.flops_per_s.{arithmetic}", 0.0)
    if not flops and f"{name}.flops_per_s" in profile:
        flops = profile[f"{name}.flops_per_s"] * peak / device.peak(DType.FP32)
    return (
        profile.get(f"{name}.launch_s", DATA_SHEET_LAUNCH_S),
        flops or peak * DATA_SHEET_FLOPS.get(name, 0.25),
        profile.get(f"{name}.bytes_per_s", 0.0) or device.memory.bandwidth_bytes_per_s * DATA_SHEET_BYTES.get(name, 0.7),
    )


def _check(device: Device) -> None:
    known = [f"{name}.{term}" for name in CLASSES for term in TERMS]
    known += [f"{name}.flops_per_s.{path}" for name in CLASSES for path in DType]
    for name in device.profile:
        if name not in known:
            near = nearest(name, known)
            raise CatalogError(f"{device.name}: [profile] has no constant {name!r}: did you mean {near[0] if near else known[0]!r}?")
