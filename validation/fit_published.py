"""Fitting a handful of physical constants to published runs, and how well they then predict groups that they have not seen.

Generic: a predictor is a function from constants and row numbers to times. The fit is least squares in logarithms with log-normal priors,
because constants are positive, errors are relative, and sources determine some constants badly. Every form that is tried is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.hardware import Cluster, Link
from simtrain.core.polynomial import FloatArray
from simtrain.core.runtime import Runtime
from validation.errors import ErrorSummary, summarise
from validation.statistics import held_out_constants

Values = Mapping[str, float]
Predict = Callable[[Values, Sequence[int]], FloatArray]
"""Predicted times of the rows of given numbers, under given constants."""

NOISE = 0.05
"""Relative deviation that a row is allowed for free; it weighs rows against priors."""
STEP = 1e-3
"""Relative change of a constant for numerical derivatives: a scheduled step is piecewise smooth, so smaller ones see its corners."""
TOLERANCE = 1e-5
"""Relative change of the sum of squares, or of the constants, at which a fit ends."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant to fit.

    Attributes:
        name: "device.X" (constant X of the compute model), "runtime.X" (field X of every runtime), "runtime.NAME.X" (of that
            runtime alone) or "link.NAME.X" (field X of a link); other names are the predictor's own.
        prior: Best guess before these rows.
        spread: Standard deviation of its logarithm.
        low: Physically possible at least.
        high: Physically possible at most.
        source: What the prior rests on.
    """

    name: str
    prior: float
    spread: float
    low: float
    high: float
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.prior <= self.high or not self.spread > 0:
            raise InputError(f"constant {self.name}: needs 0 < low <= prior <= high and a spread above 0")


NETWORK_CONSTANTS = (
    Constant("link.infiniband-hdr.efficiency", 0.92, 0.1, 0.5, 1.0, "at most the line rate"),
    Constant("link.infiniband-ndr.efficiency", 0.92, 0.1, 0.5, 1.0, "at most the line rate"),
    Constant("link.omni-path-100.efficiency", 0.405, 0.2, 0.2, 1.0, "bus bandwidth of one port, measured on the same machines"),
    Constant("link.ethernet-100g.efficiency", 0.8, 0.2, 0.4, 1.0, "RoCE below the line rate"),
    Constant("link.nvlink3.efficiency", 0.78, 0.1, 0.5, 0.9, "all-reduce tables of NCCL on one node reach 0.65 to 0.8 of the line rate"),
)
SOFTWARE_CONSTANTS = (
    Constant(
        "runtime.deepspeed.launch_s", 60e-6, 0.5, 5e-6, 120e-6, "host time of a launch under hooks and checkpoints; hosts differ by 2x"
    ),
    Constant("runtime.fsdp2.hopper_products", 1.0, 0.15, 0.6, 1.0, "libraries of 2023, the first for Hopper, were no faster than today's"),
)
DEVICE_CONSTANTS = (
    Constant("device.gemm_efficiency_16bit", 0.92, 0.05, 0.80, 1.0, "0.85 of the peak at the best shapes, after tile losses"),
    Constant("device.elements_per_clock", 13.0, 0.3, 8.0, 20.0, "published training of single GPUs, which it is shipped from"),
    Constant("device.misaligned_line", 0.3, 0.5, 0.1, 1.0, "set with rows of BLOOM in sight"),
)
"""What the engine lets one change, with where it may lie; priors are what is shipped. Which of them a source can determine shows in
`Fit.told`."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted constants.

    Attributes:
        values: By name.
        deviation: Standard deviation of the logarithm of each, from the curvature at the optimum, priors included.
        told: Share of each prior's uncertainty that the rows removed: 0 means that they say nothing about it.
        at_limit: Constants that ended on a physical limit: the form is wrong there, or the limit is.
        errors: On the rows fitted to.
    """

    values: Mapping[str, float]
    deviation: Mapping[str, float]
    told: Mapping[str, float]
    at_limit: tuple[str, ...]
    errors: ErrorSummary

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "values": dict(self.values),
            "deviation": dict(self.deviation),
            "told": dict(self.told),
            "at_limit": list(self.at_limit),
            "errors": self.errors.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A form, judged on groups that its constants have not seen.

    Attributes:
        fit: On all rows.
        predicted: Of every row, by the fit without its group.
        errors: Of these.
        null: Of the best single constant per pool, its group left out: what a constant alone does under the same rule.
        folds: Constants of each fold, by the group left out.
    """

    fit: Fit
    predicted: FloatArray
    errors: ErrorSummary
    null: ErrorSummary | None
    folds: Mapping[Hashable, Mapping[str, float]]

    def spread(self, name: str) -> tuple[float, float]:
        """Returns the smallest and largest value of a constant over the folds."""
        values = [fold[name] for fold in self.folds.values()]
        return min(values), max(values)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "fit": self.fit.to_dict(),
            "held_out": self.errors.to_dict(),
            "null_held_out": self.null.to_dict() if self.null else None,
            "skill": 1 - self.errors.mean / self.null.mean if self.null and self.null.mean else None,
            "spread": {name: self.spread(name) for name in self.fit.values},
            "folds": {str(group): dict(values) for group, values in self.folds.items()},
        }


@dataclass(frozen=True, slots=True)
class Variant:
    """A form that can be fitted: a predictor and its constants."""

    predict: Predict
    constants: tuple[Constant, ...]


def fit_constants(
    predict: Predict,
    measured: FloatArray,
    constants: Sequence[Constant],
    *,
    rows: Sequence[int] | None = None,
    weights: FloatArray | None = None,
    robust: bool = True,
    start: Values | None = None,
) -> Fit:
    """Fits constants to rows: log(predicted / measured) against `NOISE`, log(constant / prior) against each prior's spread.

    Args:
        predict: The form.
        measured: Times of all rows.
        constants: What is free.
        rows: Which rows to fit to; all by default.
        weights: Of all rows (sources of different length can be made to count alike).
        robust: Whether residuals beyond `NOISE` count by their size instead of their square (pseudo-Huber), so that a single
            anomalous run does not decide.
        start: Where the search begins; at the priors by default.

    Raises:
        InputError: No rows, no constants, or a prediction that is not positive.
    """
    from scipy.optimize import least_squares

    chosen = list(range(len(measured)) if rows is None else rows)
    if not chosen or not constants:
        raise InputError("a fit needs rows and constants")
    target = np.log(measured[chosen])
    scale = np.sqrt(np.ones(len(chosen)) if weights is None else weights[chosen]) / NOISE
    names, prior = [c.name for c in constants], np.log([c.prior for c in constants])
    spread = np.array([c.spread for c in constants])

    low, high = np.array([c.low for c in constants]), np.array([c.high for c in constants])

    def named(logs: FloatArray) -> dict[str, float]:
        return dict(zip(names, np.clip(np.exp(logs), low, high).tolist(), strict=True))

    def residuals(logs: FloatArray) -> FloatArray:
        times = np.asarray(predict(named(logs), chosen), dtype=np.float64)
        if times.shape != target.shape or not (times > 0).all():
            raise InputError("a predictor must return one time above 0 for every row asked for")
        misfit = np.log(times) - target
        if robust:
            misfit = np.sign(misfit) * NOISE * np.sqrt(2 * (np.sqrt(1 + (misfit / NOISE) ** 2) - 1))
        return np.concatenate([misfit * scale, (logs - prior) / spread])

    begin = prior if start is None else np.log([start[name] for name in names])
    limits, steps = (np.log(low), np.log(high)), np.full(len(prior), STEP)
    found = least_squares(residuals, begin, bounds=limits, diff_step=steps, x_scale=spread, ftol=TOLERANCE, xtol=TOLERANCE)
    slopes: FloatArray = np.asarray(found.jac, dtype=np.float64)
    deviation = np.sqrt(np.maximum(np.diag(np.linalg.pinv(slopes.T @ slopes)), 0.0))
    values = named(found.x)
    errors = np.asarray(predict(values, chosen)) / measured[chosen] - 1
    at_limit = tuple(c.name for c in constants if min(values[c.name] / c.low, c.high / values[c.name]) < 1 + STEP)
    return Fit(
        values=values,
        deviation=dict(zip(names, deviation.tolist(), strict=True)),
        told=dict(zip(names, np.clip(1 - deviation / spread, 0, 1).tolist(), strict=True)),
        at_limit=at_limit,
        errors=summarise(errors.tolist()),
    )


def hold_out(
    variant: Variant,
    measured: FloatArray,
    groups: Sequence[Hashable],
    *,
    null_ratios: FloatArray | None = None,
    null_pools: Sequence[Hashable] | None = None,
    weights: FloatArray | None = None,
    robust: bool = True,
) -> HeldOut:
    """Fits a form once for every group left out, and predicts that group.

    Args:
        variant: The form.
        measured: Times of all rows.
        groups: Of each row: model size or family of layouts, never single rows (rows of a group share their errors).
        null_ratios: Time at the peak over measured time of each row, for the null under the same rule.
        null_pools: What shares a null constant (device and arithmetic path); all rows share one by default.
        weights: As for `fit_constants`.
        robust: As for `fit_constants`.

    Raises:
        InputError: Fewer than two groups.
    """
    order = list(dict.fromkeys(groups))
    if len(order) < 2:
        raise InputError("holding out needs at least two groups")
    predicted = np.empty(len(measured))
    folds: dict[Hashable, Mapping[str, float]] = {}
    options: dict[str, Any] = {"weights": weights, "robust": robust}
    whole = fit_constants(variant.predict, measured, variant.constants, **options)
    for group in order:
        inside = [i for i, g in enumerate(groups) if g == group]
        outside = [i for i, g in enumerate(groups) if g != group]
        fold = fit_constants(variant.predict, measured, variant.constants, rows=outside, start=whole.values, **options)
        folds[group] = fold.values
        predicted[inside] = variant.predict(fold.values, inside)
    null = None
    if null_ratios is not None:
        scales = held_out_constants(null_ratios.tolist(), null_pools or [0] * len(groups), groups)
        found = [scale * ratio - 1 for scale, ratio in zip(scales, null_ratios.tolist(), strict=True) if scale is not None]
        null = summarise(found) if found else None
    return HeldOut(whole, predicted, summarise((predicted / measured - 1).tolist()), null, folds)


def with_constants(cluster: Cluster, runtime: Runtime, values: Values) -> tuple[Cluster, Runtime]:
    """Returns machines and framework with constants changed; other names than those of `Constant` are ignored.

    Raises:
        InputError: The runtime has no such behaviour, or a link no such field.
    """
    device = {name.removeprefix("device."): value for name, value in values.items() if name.startswith("device.")}
    behaviour = {
        name.removeprefix("runtime.").removeprefix(f"{runtime.name}."): value
        for name, value in values.items()
        if name.startswith("runtime.") and (name.count(".") == 1 or name.startswith(f"runtime.{runtime.name}."))
    }

    def changed(link: Link | None) -> Link | None:
        if link is None:
            return None
        own: dict[str, Any] = {name.rpartition(".")[2]: v for name, v in values.items() if name.startswith(f"link.{link.name}.")}
        if unknown := set(own) - {"bandwidth_bytes_per_s", "efficiency", "latency_s"}:
            raise InputError(f"a link has no {min(unknown)!r} to fit: bandwidth_bytes_per_s, efficiency or latency_s")
        return replace(link, **own)

    made = {d: replace(d, profile={**d.profile, **device}) for d in set(cluster.devices)}
    nodes = tuple(
        replace(
            node,
            devices=tuple(made[d] for d in node.devices),
            host_link=changed(node.host_link) or node.host_link,
            peer_link=changed(node.peer_link),
            nic=changed(node.nic),
        )
        for node in cluster.nodes
    )
    return replace(cluster, nodes=nodes), runtime.with_(**behaviour)
