"""Calibration: minutes of real training steps turned into the constants of this machine's CPU core, or of its GPU.

Small training steps are run; the time inside each operator, where it runs, is added up by class; each class gets a cost per launch, per
FLOP and per byte, for fp32 and for bf16 autocast apart. What is left of the step (Python, autograd) becomes a cost per launch, and what
checkpointed steps take beyond their recomputation a cost per saved tensor. On the processor all times are first put at one speed of the
machine, by the reference workload timed beside each step (`validation.reference`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hardware_models.cpu import CLASSES, class_constants, kernel_class
from hardware_models.operator_table import label
from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType, precision
from simtrain.core.workload import OperatorKind
from validation.features import CPU_RUNTIME, class_features, executed_flops, saved_tensors, workload_of
from validation.fit import ClassCost, ClassFit, fit_classes, framework_launch_s
from validation.gpu_steps import GPU_CALIBRATION_STEPS, QUICK_GPU_NAMES
from validation.machine_profile import BASE_DEVICE, MachineProfile
from validation.measure import Progress, environment, measure
from validation.measurement import Measurement, Settings
from validation.operator_table import entries, merged, operators_of
from validation.reference import REFERENCE, REPETITIONS, reference_time_s
from validation.steps import CALIBRATION_STEPS, TrainingStep, quick_calibration_steps

RECOMPUTE = "recompute.launch_s"
OPTIMIZER = kernel_class(OperatorKind.OPTIMIZER)
CALIBRATION_SETTINGS = Settings(
    warmup_steps=2, timed_steps=5, operator_steps=4, processes=1, memory=False, reference_repetitions=REPETITIONS
)


def calibrate(
    steps: Sequence[TrainingStep] = CALIBRATION_STEPS,
    settings: Settings = CALIBRATION_SETTINGS,
    progress: Progress | None = None,
    *,
    data_sheet: str | None = None,
    keep: Callable[[Sequence[Measurement]], None] | None = None,
) -> MachineProfile:
    """Measures this machine.

    Args:
        steps: What to run; the processor's shipped list by default, see `calibration_list`.
        settings: How to measure, and on which device; operator times must be on.
        progress: Told about each measured step.
        data_sheet: Device of the catalog, or a device file, that a GPU is; by default found by its name and size.
        keep: Given the measurements before anything is fitted.

    Raises:
        InputError: PyTorch is not installed, sees no such device, the catalog has none like it, or operator times are left out.
    """
    if not settings.operator_steps:
        raise InputError("calibration needs the times inside operators: operator_steps must be at least 1")
    from validation.calibrate_gpu import data_sheet_of, profile_from_gpu

    on_gpu = settings.device != "cpu"
    sheet = (data_sheet or data_sheet_of(environment(settings.device).accelerator)) if on_gpu else ""
    measurements = measure(steps, settings, progress)
    if keep is not None:
        keep(measurements)
    return profile_from_gpu(measurements, sheet) if on_gpu else profile_from(measurements)


def calibration_list(device: str, *, quick: bool = False) -> tuple[TrainingStep, ...]:
    """Returns the fixed list of a device.

    Args:
        device: "cpu" or "cuda".
        quick: Only what the quick test steps need.
    """
    if device == "cpu":
        return quick_calibration_steps() if quick else CALIBRATION_STEPS
    return tuple(s for s in GPU_CALIBRATION_STEPS if not quick or s.name in QUICK_GPU_NAMES)


def calibration_settings(device: str, *, quick: bool = False) -> Settings:
    """Returns how the fixed list of a device is measured; a GPU and a quick calibration do without the reference workload."""
    return replace(CALIBRATION_SETTINGS, device=device, reference_repetitions=0 if quick or device != "cpu" else REPETITIONS)


def profile_from(measurements: Sequence[Measurement]) -> MachineProfile:
    """Fits a profile to measurements: classes of operators by arithmetic path, then what recomputation costs on top.

    Args:
        measurements: With times inside operators; checkpointed steps among them only serve the last term. Where the reference workload
            was timed beside all of them, their times are put at the speed at which it takes the median of what it took.

    Raises:
        InputError: They do not say where they were taken.
    """
    where = measurements[0].environment
    if where is None:
        raise InputError("measurements without their environment cannot make a profile")
    reference_s = reference_time_s(measurements)
    measurements = [m.at_reference(reference_s) for m in measurements]
    plain = [m for m in measurements if m.step.parsed().checkpoint == "none"]
    paths = dict.fromkeys(arithmetic(m.step) for m in plain)
    parts = {path: fit_path(path, [m for m in plain if arithmetic(m.step) is path]) for path in paths}
    total_s = sum(fit.seconds for part in parts.values() for fit in part.fits.values())
    errors = [error for part in parts.values() for error in part.step_errors]
    profile = MachineProfile(
        constants={key: value for part in parts.values() for key, value in part.constants().items()},
        environment=where,
        steps=tuple(m.step.name for m in measurements),
        residuals={label(name, path): fit.residual for path, part in parts.items() for name, fit in part.fits.items()},
        shares={label(name, path): fit.seconds / total_s for path, part in parts.items() for name, fit in part.fits.items()},
        step_error=float(np.mean(np.abs(errors))),
        framework_launch_s=parts[next(iter(parts))].outside_s,
        null_flops_per_s={str(path): null_rate([m for m in plain if arithmetic(m.step) is path]) for path in paths},
        operator_table=merged(*(part.table([m for m in plain if arithmetic(m.step) is path]) for path, part in parts.items())),
        reference=REFERENCE if reference_s else "",
        reference_time_s=reference_s,
    )
    recomputed = [m for m in measurements if m not in plain]
    return _with_recomputation(profile, recomputed) if recomputed else profile


def arithmetic(step: TrainingStep) -> DType:
    """Returns the path that a step's matrix products run on."""
    return precision(step.parsed().precision).arithmetic


@dataclass(frozen=True, slots=True)
class PathFit:
    """Costs of all classes on one arithmetic path.

    Attributes:
        path: Which.
        fits: By class.
        outside_s: Time outside operators, per launch.
        step_errors: Of the calibration steps themselves, refitted.
    """

    path: DType
    fits: Mapping[str, ClassFit]
    outside_s: float
    step_errors: tuple[float, ...]

    def costs(self) -> dict[str, ClassCost]:
        """Returns the cost of each class, the time outside operators included."""
        return {name: _with_framework(name, fit.cost, self.outside_s) for name, fit in self.fits.items()}

    def table(self, measurements: Sequence[Measurement]) -> dict[str, tuple[tuple[float, ...], ...]]:
        """Returns the operator table of measured steps on this path."""
        costs = self.costs()
        tables = [
            entries(operators_of(workload_of(m.step), m.step.parsed(), CPU_RUNTIME), m.call_times_s, costs, self.outside_s)
            for m in measurements
        ]
        return {label(name, self.path): rows for name, rows in merged(*tables).items()}

    def constants(self) -> dict[str, float]:
        """Returns the costs as a device's profile holds them."""
        suffix = "" if self.path is DType.FP32 else f".{self.path}"
        costs = self.costs()
        if self.path is not DType.FP32:
            costs.pop(OPTIMIZER, None)  # masters are updated in fp32 whatever the path
        return {
            f"{name}.{term}{suffix}": value
            for name, cost in costs.items()
            for term, value in (("launch_s", cost.launch_s), ("flops_per_s", cost.flops_per_s), ("bytes_per_s", cost.bytes_per_s))
        }


def fit_path(path: DType, measurements: Sequence[Measurement]) -> PathFit:
    """Fits the classes of one arithmetic path."""
    features = [class_features(m.step) for m in measurements]
    fits = fit_classes(features, [m.class_times_s for m in measurements], _priors(path))
    remainders = [m.step_time_s - sum(m.class_times_s[name] for name in fits if name in m.class_times_s) for m in measurements]
    outside_s = framework_launch_s(remainders, [_launches(f, fits) for f in features])
    costs = {name: _with_framework(name, fit.cost, outside_s) for name, fit in fits.items()}
    errors = tuple(_seconds(f, costs) / m.step_time_s - 1 for f, m in zip(features, measurements, strict=True))
    return PathFit(path, fits, outside_s, errors)


def _with_recomputation(profile: MachineProfile, measurements: Sequence[Measurement]) -> MachineProfile:
    """Adds what checkpointing costs beside recomputation, per saved tensor: the median of what the prediction leaves over."""
    from validation.compare import predict

    free = replace(profile, constants=dict(profile.constants) | {RECOMPUTE: 0.0}).device()
    costs = [(m.step_time_s - predict(m.step, free)[0]) / saved_tensors(m.step) for m in measurements]
    return replace(profile, constants=dict(profile.constants) | {RECOMPUTE: max(0.0, float(np.median(costs)))})


def null_rate(measurements: Sequence[Measurement]) -> float:
    """Fits the null model, one FLOP/s for everything, to the same measurements: the median of what they reached."""
    return float(np.median([executed_flops(m.step) / m.step_time_s for m in measurements]))


def _priors(path: DType) -> dict[str, ClassCost]:
    device = catalog.device(BASE_DEVICE)
    return {name: ClassCost(*class_constants(device, name, path)) for name in CLASSES}


def _with_framework(name: str, cost: ClassCost, outside_s: float) -> ClassCost:
    """Adds the time outside operators to each launch, but for the optimizer, which is timed as a whole."""
    return cost if name == OPTIMIZER else ClassCost(cost.launch_s + outside_s, cost.flops_per_s, cost.bytes_per_s)


def _launches(features: Mapping[str, FloatArray], fits: Mapping[str, ClassFit]) -> float:
    return float(sum(features[name][0] for name in fits if name in features and name != OPTIMIZER))


def _seconds(features: Mapping[str, FloatArray], costs: Mapping[str, ClassCost]) -> float:
    return sum(costs[name].seconds(*row) for name, row in features.items() if name in costs)
