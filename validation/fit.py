"""Fitting what each class of operators costs: time = launches x c0 + FLOPs / c1 + bytes / c2, all non-negative.

Weak priors hold what the measurements cannot tell (a class without FLOPs, sizes that move together) at physical values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simtrain.core.polynomial import FloatArray

PRIOR_WEIGHT = 1e-4
"""A coefficient that is twice its prior costs as much as a relative misfit of all steps by the square root of this (1 %)."""
SLOWEST = 1e-3
"""A fitted rate of zero cost is written as at most 1/SLOWEST times the prior rate."""


@dataclass(frozen=True, slots=True)
class ClassCost:
    """Cost of one class of operators.

    Attributes:
        launch_s: Per launch.
        flops_per_s: Rate of arithmetic.
        bytes_per_s: Rate of memory traffic.
    """

    launch_s: float
    flops_per_s: float
    bytes_per_s: float

    def seconds(self, launches: float, flops: float, bytes_moved: float) -> float:
        """Returns the time of some work of this class."""
        return launches * self.launch_s + flops / self.flops_per_s + bytes_moved / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class ClassFit:
    """A fitted cost and how well it fits.

    Attributes:
        cost: The coefficients.
        seconds: Measured time of the class over all calibration steps.
        residual: Mean absolute relative misfit, weighted by time.
    """

    cost: ClassCost
    seconds: float
    residual: float


def fit_class(features: FloatArray, seconds: FloatArray, prior: ClassCost) -> ClassFit:
    """Fits one class over training steps.

    Errors are weighted by 1/sqrt(time): neither the longest step alone nor the shortest decides.

    Args:
        features: Launches, FLOPs and bytes of each step, shape (steps, 3).
        seconds: Measured time of each step.
        prior: Where undetermined coefficients stay.
    """
    from scipy.optimize import nnls

    scale = np.array([prior.launch_s, 1 / prior.flops_per_s, 1 / prior.bytes_per_s])
    weight = 1 / np.sqrt(np.maximum(seconds, 1e-9))
    design = features * scale * weight[:, None]
    strength = np.sqrt(PRIOR_WEIGHT * float(seconds.sum()))
    shares, _ = nnls(np.vstack([design, strength * np.eye(3)]), np.concatenate([seconds * weight, np.full(3, strength)]))
    unit_costs = shares * scale
    misfit = np.abs(features @ unit_costs - seconds).sum() / max(float(seconds.sum()), 1e-12)
    rates = 1 / np.maximum(unit_costs[1:], SLOWEST * scale[1:])
    return ClassFit(ClassCost(float(unit_costs[0]), float(rates[0]), float(rates[1])), float(seconds.sum()), float(misfit))


def fit_classes(
    features: Sequence[Mapping[str, FloatArray]], times_s: Sequence[Mapping[str, float]], priors: Mapping[str, ClassCost]
) -> dict[str, ClassFit]:
    """Fits every class that was both measured and predicted to occur.

    Args:
        features: For each step, launches, FLOPs and bytes by class.
        times_s: For each step, measured seconds by class.
        priors: By class.
    """
    fits: dict[str, ClassFit] = {}
    for name, prior in priors.items():
        rows = [(f[name], t[name]) for f, t in zip(features, times_s, strict=True) if name in f and t.get(name, 0.0) > 0]
        if rows:
            fits[name] = fit_class(np.array([r[0] for r in rows]), np.array([r[1] for r in rows]), prior)
    return fits


def framework_launch_s(remainders_s: Sequence[float], launches: Sequence[float]) -> float:
    """Fits the time outside operators (Python, autograd, bookkeeping) as a cost per launched kernel; at least 0."""
    r, n = np.array(remainders_s), np.array(launches)
    return max(0.0, float(r @ n / (n @ n)))
