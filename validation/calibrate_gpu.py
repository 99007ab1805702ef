"""Calibration of a GPU: factors over its data sheet's times by class and path, the operator table, and the host's time per launch.

One factor a class is measured time over modelled time, both summed over the calibration steps: long steps weigh more, as they do in what
is predicted later. The operator table then holds what single shapes take beyond that. The host's time per launch comes from steps
whose kernels are so small that the device waits for the host. Not yet run on CUDA hardware.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hardware_models.measured import HOST_FACTOR, data_sheet_times_s, factor_name, measured_class
from hardware_models.operator_table import label
from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.hardware import Device
from simtrain.core.precision import DType, precision
from simtrain.core.runtimes import runtime
from validation.calibrate import OPTIMIZER, arithmetic, null_rate
from validation.features import GPU_RUNTIME, workload_of
from validation.machine_profile import MachineProfile
from validation.measurement import Measurement
from validation.operator_table import Formula, Operators, entries, kernels_in_order, merged, operators_of, update_kernels, update_of

HOST_BOUND = 0.8
"""A step whose kernels take less than this share of its time waits for the host."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Measured over modelled time of a class.

    Attributes:
        value: The factor.
        seconds_measured: Over all calibration steps.
        residual: Mean absolute misfit of steps with the factor, over the measured time.
    """

    value: float
    seconds_measured: float = 0.0
    residual: float = 0.0

    def seconds(self, data_sheet_s: float) -> float:
        """Returns the time of work that the data sheet's model gives a time."""
        return self.value * data_sheet_s


def gpu_formula(sheet: Device) -> Formula:
    """Returns how operators are classed and what work they are: the seconds that the data sheet's model gives them."""
    return Formula(measured_class, lambda kernels: data_sheet_times_s(sheet, kernels)[:, None])


def profile_from_gpu(measurements: Sequence[Measurement], data_sheet: str) -> MachineProfile:
    """Fits a profile to measurements on a GPU; checkpointed steps among them only serve the error of the fit.

    Args:
        measurements: With times inside operators.
        data_sheet: Device of the catalog, or a device file.

    Raises:
        InputError: They do not say where they were taken.
        UnknownNameError: The catalog has no such device.
    """
    sheet = catalog.device(data_sheet)
    if measurements[0].environment is None:
        raise InputError("measurements without their environment cannot make a profile")
    plain = [m for m in measurements if m.step.parsed().checkpoint == "none"]
    asked = [step_operators(m, sheet) for m in plain]
    factors = fit_factors(asked, plain)
    host = host_factor(plain)
    total_s = sum(f.seconds_measured for f in factors.values())
    constants = {factor_name(name, path): factor.value for (name, path), factor in factors.items()}
    busy = [m for m in plain if not waits_for_host(m)] or plain
    profile = MachineProfile(
        constants=constants | ({HOST_FACTOR: host} if host else {}),
        environment=measurements[0].environment,
        steps=tuple(m.step.name for m in measurements),
        residuals={label(*key): factor.residual for key, factor in factors.items()},
        shares={label(*key): factor.seconds_measured / total_s for key, factor in factors.items()},
        step_error=0.0,
        framework_launch_s=(host or 1.0) * runtime(GPU_RUNTIME).host.launch_s,
        null_flops_per_s={str(p): null_rate([m for m in busy if arithmetic(m.step) is p]) for p in dict.fromkeys(map(_path, busy))},
        operator_table=merged(*(table_of(m, operators, factors) for m, operators in zip(plain, asked, strict=True))),
        data_sheet=data_sheet,
    )
    return _with_step_error(profile, measurements)


def _path(measured: Measurement) -> DType:
    return arithmetic(measured.step)


def step_operators(measured: Measurement, sheet: Device) -> dict[str, Operators]:
    """Returns what a measured step asks of each class, the optimizer included."""
    work, plan, formula = workload_of(measured.step), measured.step.parsed(), gpu_formula(sheet)
    return operators_of(work, plan, GPU_RUNTIME, formula) | {OPTIMIZER: update_of(work, plan, GPU_RUNTIME, formula)}


def path_of(name: str, measured: Measurement) -> DType:
    """Returns the path that a class's kernels carry: that of the products, the weights' own for the optimizer."""
    return precision(measured.step.parsed().precision).parameter if name == OPTIMIZER else arithmetic(measured.step)


def fit_factors(asked: Sequence[Mapping[str, Operators]], measurements: Sequence[Measurement]) -> dict[tuple[str, DType], Factor]:
    """Fits one factor to each class and path that was both measured and predicted to occur."""
    pairs: dict[tuple[str, DType], list[tuple[float, float]]] = {}
    for operators, measured in zip(asked, measurements, strict=True):
        for name, found in operators.items():
            seconds = measured.class_times_s.get(name, 0.0)
            if seconds > 0:
                pairs.setdefault((name, path_of(name, measured)), []).append((float(found.work.sum()), seconds))
    return {key: _factor(np.array(rows)) for key, rows in pairs.items()}


def _factor(rows: np.ndarray) -> Factor:
    modelled, measured = rows.T
    value = float(measured.sum() / modelled.sum())
    return Factor(value, float(measured.sum()), float(np.abs(value * modelled - measured).sum() / measured.sum()))


def table_of(
    measured: Measurement, operators: Mapping[str, Operators], factors: Mapping[tuple[str, DType], Factor]
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Returns the operator table of one measured step."""
    costs = {name: factors[name, path_of(name, measured)] for name in operators if (name, path_of(name, measured)) in factors}
    table = entries(operators, measured.call_times_s, costs, 0.0)
    return {label(name, path_of(name, measured)): rows for name, rows in table.items()}


def waits_for_host(measured: Measurement) -> bool:
    """Tells whether the device was idle for much of a step."""
    return sum(measured.class_times_s.values()) < HOST_BOUND * measured.step_time_s


def host_factor(measurements: Iterable[Measurement]) -> float | None:
    """Returns the host's time per launch over what the runtime assumes: the median over steps that wait for it, `None` without one."""
    assumed_s = runtime(GPU_RUNTIME).host.launch_s
    found = [m.step_time_s / (launches(m) * assumed_s) for m in measurements if waits_for_host(m)]
    return float(np.median(found)) if found else None


def launches(measured: Measurement) -> int:
    """Returns the kernels that a plain step launches, by the closed form."""
    work, plan = workload_of(measured.step), measured.step.parsed()
    passes = sum(int(kernels.launches.sum()) for kernels in kernels_in_order(work, plan, GPU_RUNTIME))
    return passes + int(update_kernels(work, plan, GPU_RUNTIME).launches.sum())


def _with_step_error(profile: MachineProfile, measurements: Sequence[Measurement]) -> MachineProfile:
    from validation.compare import predict

    device = profile.device()
    errors = [predict(m.step, device)[0] / m.step_time_s - 1 for m in measurements]
    return replace(profile, step_error=float(np.mean(np.abs(errors))))


def data_sheet_of(accelerator: Mapping[str, str | int]) -> str:
    """Returns the name of the catalog's device that a GPU is.

    Args:
        accelerator: As `CudaBackend.describe` names it.

    Raises:
        InputError: The catalog has no such device.
    """
    name = str(accelerator["name"])
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    packed = "".join(re.findall(r"[a-z0-9]+", name.lower()))
    fitting = [
        device
        for device in map(catalog.device, catalog.names("devices"))
        if device.device_class == "gpu"
        and device.name.split("-")[0].lower() in packed
        and device.multiprocessors == int(accelerator["multiprocessors"])
        and abs(device.memory.capacity_bytes / int(accelerator["memory_bytes"]) - 1) < 0.1
    ]
    if not fitting:
        raise InputError(
            f"the catalog has no data sheet of {name!r} with {accelerator['multiprocessors']} multiprocessors and "
            f"{int(accelerator['memory_bytes']) / 2**30:.0f} GiB: name one with --data-sheet, or write one (docs/adding_a_device.md)"
        )
    return max(fitting, key=lambda device: len(words & set(device.name.lower().split("-")))).name


def describe(profile: MachineProfile) -> str:
    """Returns the factors of a profile as a table, with where they were measured."""
    device = profile.environment.accelerator
    lines = [
        f"{device['name']} (data sheet {profile.data_sheet}), CUDA {device.get('cuda_version', '?')}, driver "
        f"{device.get('driver_version', '?')}, torch {profile.environment.torch_version}",
        f"{'class':<22}{'share':>8}{'over data sheet':>17}{'misfit':>8}",
    ]
    for name, share in sorted(profile.shares.items(), key=lambda pair: -pair[1]):
        kind, _, path = name.partition(".")
        factor = profile.constants[factor_name(kind, DType(path) if path else DType.FP32)]
        lines.append(f"{name:<22}{share:>8.1%}{factor:>17.2f}{profile.residuals[name]:>8.1%}")
    waits = "measured" if HOST_FACTOR in profile.constants else "assumed: no step waited for the host"
    host = f"host {profile.framework_launch_s * 1e6:.2f} us a launch ({waits})"
    return "\n".join([*lines, f"calibration steps refitted within {profile.step_error:.2%}; {host}"])
