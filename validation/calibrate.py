"""Calibration: a minute of real training steps turned into the constants of this machine's CPU core.

Nine small training steps are run; the time inside each operator, where it runs, is added up by class; each class gets a cost per
launch, per FLOP and per byte. What is left of the step (Python, autograd) becomes a cost per launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hardware_models.cpu import CLASSES, class_constants, kernel_class
from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind
from validation.features import class_features, executed_flops
from validation.fit import ClassCost, ClassFit, fit_classes, framework_launch_s
from validation.machine_profile import BASE_DEVICE, MachineProfile
from validation.measure import Progress, measure
from validation.measurement import Measurement, Settings
from validation.steps import CALIBRATION_STEPS, TrainingStep

OPTIMIZER = kernel_class(OperatorKind.OPTIMIZER)
CALIBRATION_SETTINGS = Settings(warmup_steps=3, timed_steps=6, operator_steps=4, processes=1, memory=False)


def calibrate(
    steps: Sequence[TrainingStep] = CALIBRATION_STEPS, settings: Settings = CALIBRATION_SETTINGS, progress: Progress | None = None
) -> MachineProfile:
    """Measures this machine.

    Args:
        steps: What to run; the shipped list by default.
        settings: How to measure; operator times must be on.
        progress: Told about each measured step.

    Raises:
        InputError: PyTorch is not installed, or the settings leave operator times out.
    """
    if not settings.operator_steps:
        raise InputError("calibration needs the times inside operators: operator_steps must be at least 1")
    return profile_from(measure(steps, settings, progress))


def profile_from(measurements: Sequence[Measurement]) -> MachineProfile:
    """Fits a profile to measurements.

    Args:
        measurements: With times inside operators.
    """
    features = [class_features(m.step) for m in measurements]
    fits = fit_classes(features, [m.class_times_s for m in measurements], _priors())
    remainders = [m.step_time_s - sum(m.class_times_s[name] for name in fits if name in m.class_times_s) for m in measurements]
    outside = framework_launch_s(remainders, [_launches(f, fits) for f in features])
    costs = {name: _with_framework(name, fit.cost, outside) for name, fit in fits.items()}
    total_s = sum(fit.seconds for fit in fits.values())
    if measurements[0].environment is None:
        raise InputError("measurements without their environment cannot make a profile")
    return MachineProfile(
        constants=_constants(costs),
        environment=measurements[0].environment,
        steps=tuple(m.step.name for m in measurements),
        residuals={name: fit.residual for name, fit in fits.items()},
        shares={name: fit.seconds / total_s for name, fit in fits.items()},
        step_error=float(np.mean([abs(_seconds(f, costs) / m.step_time_s - 1) for f, m in zip(features, measurements, strict=True)])),
        framework_launch_s=outside,
        null_flops_per_s=null_rate(measurements),
    )


def null_rate(measurements: Sequence[Measurement]) -> float:
    """Fits the null model, one FLOP/s for everything, to the same measurements: the median of what they reached."""
    return float(np.median([executed_flops(m.step) / m.step_time_s for m in measurements]))


def _priors() -> dict[str, ClassCost]:
    device = catalog.device(BASE_DEVICE)
    return {name: ClassCost(*class_constants(device, name, DType.FP32)) for name in CLASSES}


def _with_framework(name: str, cost: ClassCost, outside_s: float) -> ClassCost:
    """Adds the time outside operators to each launch, but for the optimizer, which is timed as a whole."""
    return cost if name == OPTIMIZER else ClassCost(cost.launch_s + outside_s, cost.flops_per_s, cost.bytes_per_s)


def _launches(features: Mapping[str, FloatArray], fits: Mapping[str, ClassFit]) -> float:
    return float(sum(features[name][0] for name in fits if name in features and name != OPTIMIZER))


def _seconds(features: Mapping[str, FloatArray], costs: Mapping[str, ClassCost]) -> float:
    return sum(costs[name].seconds(*row) for name, row in features.items() if name in costs)


def _constants(costs: Mapping[str, ClassCost]) -> dict[str, float]:
    return {
        f"{name}.{term}": value
        for name, cost in costs.items()
        for term, value in (("launch_s", cost.launch_s), ("flops_per_s", cost.flops_per_s), ("bytes_per_s", cost.bytes_per_s))
    }
