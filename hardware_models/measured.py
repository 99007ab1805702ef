"""The compute model of a calibrated GPU: times from its data sheet, times what a calibration measured over them.

`time = data sheet's time x factor of the class and path x correction of the operator table`. The GPU model (`hardware_models.gpu`) keeps
the physics of sizes (waves, tiles, traffic), so that a factor holds beyond the sizes that were timed; single shapes that it misses are
corrected by the operator table. Factors are `<class>.factor` in the device's `[profile]`, of another path than fp32 with its name behind
(`gemm.factor.bf16`). A class and path that were not measured keep the data sheet's time.

`host.launch_factor` is the host's time per launch over what runtimes assume; the device model does not use it, `simtrain.step.costs` does.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from hardware_models.cpu import CLASSES, kernel_class
from hardware_models.gpu import GpuModel
from hardware_models.gpu_constants import GpuConstants
from hardware_models.operator_table import coordinates, correction, label
from simtrain.core.errors import CatalogError, nearest
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind

FACTOR = "factor"
HOST_FACTOR = "host.launch_factor"


def factor_name(name: str, path: DType) -> str:
    """Names the factor of a class on an arithmetic path: "gemm.factor", "gemm.factor.bf16"."""
    return label(f"{name}.{FACTOR}", path)


def measured_class(kind: OperatorKind, name: str = "") -> str:
    """Returns the class of operators that share a factor: those of the CPU model, but what a core is slow at costs no GPU extra."""
    found = kernel_class(kind, name)
    return {"activation_tanh": "activation", "complex": "elementwise", "cast": "elementwise"}.get(found, found)


class MeasuredModel:
    """Prices kernels on calibrated GPUs; see the module's description.

    Attributes:
        name: As devices name it in `compute_model`.
    """

    name = "measured"

    def kernel_times_s(self, device: Device, kernels: KernelBatch) -> FloatArray:
        """Returns the device time of each kernel.

        Raises:
            UnsupportedError: The device lacks the arithmetic path.
            CatalogError: The profile names a factor that does not exist.
        """
        _check(device)
        times = data_sheet_times_s(device, kernels)
        named = [measured_class(kind, name) for kind, name in zip(kernels.kinds, kernels.names, strict=True)]
        for name in dict.fromkeys(named):
            chosen = np.array([other == name for other in named])
            times[chosen] *= device.profile.get(factor_name(name, kernels.arithmetic), 1.0)
            known = device.operator_table.get(label(name, kernels.arithmetic))
            if known is not None:
                times[chosen] *= correction(known, coordinates(kernels)[chosen])
        return times

    def sources(self, device: Device) -> tuple[str, ...]:
        """Returns what was measured, and what the rest is taken from."""
        factors = sorted(name.replace(f".{FACTOR}", "") for name in device.profile if name in _measured_names() and name != HOST_FACTOR)
        measured = f"{device.name}: factors over the data sheet's times measured on the machine itself: {', '.join(factors)}"
        return measured, *(f"classes not measured, and how times grow with size: {s}" for s in GpuModel().sources(data_sheet(device)))


def data_sheet(device: Device) -> Device:
    """Returns the device without what a calibration found; what its file says of the board itself stays."""
    found = _measured_names()
    kept = {name: value for name, value in device.profile.items() if name not in found}
    return replace(device, profile=kept, operator_table={}, compute_model=GpuModel.name)


def data_sheet_times_s(device: Device, kernels: KernelBatch) -> FloatArray:
    """Returns what the GPU model gives from the data sheet alone."""
    return GpuModel().kernel_times_s(data_sheet(device), kernels)


def _measured_names() -> tuple[str, ...]:
    return (HOST_FACTOR, *(factor_name(name, path) for name in CLASSES for path in DType))


def _check(device: Device) -> None:
    known = [*_measured_names(), *(f.name for f in fields(GpuConstants))]
    for name in device.profile:
        if name not in known:
            near = nearest(name, known)
            raise CatalogError(f"{device.name}: [profile] has no constant {name!r}: did you mean {near[0] if near else known[0]!r}?")
