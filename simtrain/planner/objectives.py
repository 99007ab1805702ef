"""What a plan is judged by: single objectives, several at once, and one balanced score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from simtrain.core.errors import InputError, StrategyError, UnknownNameError
from simtrain.core.result import Result
from simtrain.core.units import format_bytes, format_time

Objective = Literal["throughput", "step_time", "memory", "energy", "cost", "tokens_per_dollar", "balanced"]

OBJECTIVES: dict[str, Callable[[Result], float]] = {
    "throughput": lambda r: -r.samples_per_s,
    "step_time": lambda r: r.step_time_s,
    "memory": lambda r: r.memory.device_bytes,
    "energy": lambda r: r.energy_j / r.global_batch,
    "cost": lambda r: r.cost_usd / r.global_batch,
    "tokens_per_dollar": lambda r: r.cost_usd / (r.tokens_per_s * r.step_time_s),
}
"""What each objective minimises (energy and cost per sample, dollars per token)."""

BALANCED = "balanced"
DEGREES = ("data", "tensor", "pipeline", "context")
"""Fields whose product is the number of devices."""

PRICED = ("cost", "tokens_per_dollar")
"""Objectives that need the price of the devices."""

TIMED = ("throughput", "step_time", "cost", "tokens_per_dollar")
"""Objectives that are proportional to the step time, so that a bound of it is a bound of them (with equal devices and batch)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the balanced score: each part is relative to the best strategy in it, between 0 and 1.

    Attributes:
        throughput: Samples per second over the most.
        memory: The least memory over what is used.
        convergence: Samples' worth towards the target, `1 / (1 + batch / noise_batch)` over the best (McCandlish et al. 2018,
            "An Empirical Model of Large-Batch Training": samples to a target grow with 1 + batch / noise scale).
        noise_batch: Gradient noise scale in samples; 0 takes the largest batch considered (an assumption).
    """

    throughput: float = 0.5
    memory: float = 0.25
    convergence: float = 0.25
    noise_batch: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.throughput, self.memory, self.convergence)
        if not all(math.isfinite(p) and p >= 0 for p in (*parts, self.noise_batch)) or sum(parts) <= 0:
            raise InputError("weights must be numbers from 0 on, and one of throughput, memory and convergence must be above zero")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan must keep to.

    Attributes:
        memory_margin: Share of device memory that stays free, from 0 to below 1.
        power_w: Most average power of all devices and hosts; 0 for any.
        budget_usd: Most money for `tokens`; 0 for any.
        tokens: Length of the training for the budget and the deadline.
        deadline_s: Most time for `tokens` without a failure; 0 for any.
        memory_risk: Highest probability of running out of memory, given how far off predictions of it are; 0 to take them at their word.
    """

    memory_margin: float = 0.0
    power_w: float = 0.0
    budget_usd: float = 0.0
    tokens: float = 0.0
    deadline_s: float = 0.0
    memory_risk: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.memory_margin < 1:
            raise InputError(f"memory_margin must be a share from 0 to below 1, not {self.memory_margin!r}")
        for name in ("power_w", "budget_usd", "tokens", "deadline_s"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name} must be a number from 0 on, not {getattr(self, name)!r}")
        if not 0 <= self.memory_risk < 1:
            raise InputError(f"memory_risk must be a probability from 0 to below 1, not {self.memory_risk!r}")
        for name, what in (("budget_usd", "a budget"), ("deadline_s", "a deadline")):
            if getattr(self, name) and not self.tokens:
                raise InputError(f"{what} needs the length of the training: give tokens too (tokens=1e12)")

    def broken_by(self, result: Result) -> str:
        """Says which limit a result breaks, or nothing."""
        memory = result.memory
        if memory.device_bytes > memory.capacity_bytes * (1 - self.memory_margin):
            over = memory.device_bytes - memory.capacity_bytes * (1 - self.memory_margin)
            margin = f" with a margin of {self.memory_margin:.0%}" if self.memory_margin else ""
            between = memory.reserved_bytes - memory.allocated_bytes
            kept = f", with {format_bytes(between)} in the allocator's segments beside tensors" if memory.blocks_bytes else ""
            return f"out of memory by {format_bytes(over)}{margin} at {memory.peak_moment}{kept}"
        return next((reason for reason, times in self.asked_of(result) if times > 1), "")

    def asked_of(self, result: Result) -> list[tuple[str, float]]:
        """What limits other than memory ask, each with how much of it a result takes (above 1 is too much)."""
        steps = self.tokens / (result.tokens_per_s * result.step_time_s)
        asked = []
        if self.power_w:
            asked.append((f"draws more than {self.power_w:,.0f} W on average", result.power_w / self.power_w))
        if self.budget_usd:
            reason = f"costs more than {self.budget_usd:,.0f} USD for {self.tokens:.3g} tokens"
            asked.append((reason, result.cost_usd * steps / self.budget_usd))
        if self.deadline_s:
            reason = f"takes longer than {format_time(self.deadline_s)} for {self.tokens:.3g} tokens"
            asked.append((reason, result.step_time_s * steps / self.deadline_s))
        return asked


@dataclass(frozen=True, slots=True)
class Judge:
    """Ranks results by one objective, or by the first of several.

    Attributes:
        objectives: Names.
        weights: Of the balanced score.
    """

    objectives: tuple[str, ...]
    weights: Weights = field(default_factory=Weights)

    def __post_init__(self) -> None:
        if not self.objectives:
            raise InputError(f"give at least one objective: {', '.join((*OBJECTIVES, BALANCED))}")
        for name in self.objectives:
            if name not in OBJECTIVES and name != BALANCED:
                raise UnknownNameError("objective", name, (*OBJECTIVES, BALANCED))

    def values(self, results: Sequence[Result], objective: str) -> list[float]:
        """What is minimised, for each result."""
        if objective == BALANCED:
            return [-s for s in self.scores(results)]
        return [OBJECTIVES[objective](r) for r in results]

    def scores(self, results: Sequence[Result]) -> list[float]:
        """The balanced score of each, from 0 to 1."""
        if not results:
            return []
        weights = self.weights
        noise = weights.noise_batch or max(r.global_batch for r in results)
        quality = [1 / (1 + r.global_batch / noise) for r in results]
        fastest, best = max(r.samples_per_s for r in results), max(quality)
        smallest = min(r.memory.device_bytes for r in results)
        total = weights.throughput + weights.memory + weights.convergence
        return [
            (
                weights.throughput * r.samples_per_s / fastest
                + weights.memory * smallest / r.memory.device_bytes
                + weights.convergence * q / best
            )
            / total
            for r, q in zip(results, quality, strict=True)
        ]

    def ranked(self, results: Sequence[Result]) -> list[Result]:
        """Best first by the first objective."""
        values = self.values(results, self.objectives[0])
        return [results[i] for i in sorted(range(len(results)), key=lambda i: values[i])]

    def front(self, results: Sequence[Result]) -> list[Result]:
        """Results that no other beats in all objectives, best first by the first."""
        if len(self.objectives) < 2:
            return self.ranked(results)[:1]
        columns = [self.values(results, o) for o in self.objectives]
        points = list(zip(*columns, strict=True))
        best = [i for i in range(len(points)) if not any(_dominates(points[j], points[i]) for j in range(len(points)) if j != i)]
        chosen = set(best)
        return [r for r in self.ranked(results) if any(r is results[i] for i in chosen)]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def check_degrees(fixed: Mapping[str, Any], devices: int, batches: Sequence[int]) -> None:
    """Refuses fixed fields that contradict the number of devices or the global batch, with what would go.

    Args:
        fixed: Fields of the strategy.
        devices: How many are used.
        batches: Global batches to choose from.

    Raises:
        StrategyError: They cannot be together.
    """
    degrees = {name: fixed[name] for name in DEGREES if fixed.get(name, 1) > 1}
    product = math.prod(degrees.values())
    said = " x ".join(f"{name}={degree}" for name, degree in degrees.items())
    total = f" = {product}" if len(degrees) > 1 else ""
    if devices % product:
        near = [n for n in (devices // product * product, (devices // product + 1) * product) if n]
        raise StrategyError(
            f"fixed: {said}{total} does not divide {devices} devices: use {' or '.join(map(str, near))} devices (--devices)"
        )
    if set(DEGREES) <= set(fixed) and product != devices:
        raise StrategyError(f"fixed: {said or 'no division'} uses {product} of {devices} devices: leave one degree free, or use {product}")
    samples = math.prod(fixed.get(name, 1) for name in ("data", "micro_batch", "accumulation"))
    if all(batch % samples for batch in batches):
        named = " x ".join(f"{name}={fixed[name]}" for name in ("data", "micro_batch", "accumulation") if name in fixed)
        below = max(batches) // samples * samples
        raise StrategyError(
            f"fixed: {named} does not divide a global batch of {' or '.join(map(str, batches))}: use "
            f"{' or '.join(str(n) for n in (below, below + samples) if n)}"
        )


def weights_of(given: Mapping[str, float] | Weights | None) -> Weights:
    """Reads weights from names and values.

    Raises:
        InputError: An unknown name, or weights that cannot be.
    """
    if given is None or isinstance(given, Weights):
        return given or Weights()
    for name in given:
        if name not in Weights.__dataclass_fields__:
            raise UnknownNameError("weight", name, Weights.__dataclass_fields__)
    return Weights(**given)
