"""A choice that holds when the model errs: finalists priced anew on machines that are a little better or worse than assumed.

A search takes the strategy for which it errs most in its favour. Here every finalist meets the same errors of what all share (how fast
arithmetic, memory, links and the host really are, each drawn anew), and one of its own besides; finalists are compared by their expected
step time or by that of their worst decile, not by the best guess alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, log
from statistics import NormalDist
from typing import Any

import numpy as np

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.core.hardware import Cluster
from simtrain.core.polynomial import FloatArray
from simtrain.core.result import Result
from simtrain.core.workload import Workload
from simtrain.planner.objectives import TIMED, Limits
from simtrain.planner.resources import RESOURCES, scaled
from simtrain.planner.screen import projected_s
from simtrain.planner.space import Candidate
from simtrain.step.predict import estimate
from simtrain.step.slowest import expected_largest

CHOICES = ("expected", "worst_decile")
FINALISTS = 5
DRAWS = 4096
ON_DEVICE = ("compute", "recompute", "optimizer")
"""Parts of a step that jitter of computation lengthens."""


@dataclass(frozen=True, slots=True)
class ModelError:
    """How far off predictions are: standard deviations of logarithms, so 0.07 is about 7 %.

    The defaults of compute, memory bandwidth and `own` are what `simtrain validate published` and `validate regret` found on 2026-11-21:
    mean errors of the published sources differ by 7 %, alternatives of one decision by 5 to 7 % in BLOOM, InternEvo and own PyTorch
    runs; memory is the root mean square over 60 printed peaks of BLOOM. Links and host are assumptions.

    Attributes:
        compute: Of how fast arithmetic is, the same for all finalists.
        memory_bandwidth: Of how fast device memory is.
        link: Of how fast links are.
        host: Of how fast the host issues work.
        own: Of each strategy by itself.
        memory: Of how much memory is needed.
    """

    compute: float = 0.07
    memory_bandwidth: float = 0.07
    link: float = 0.2
    host: float = 0.2
    own: float = 0.06
    memory: float = 0.08

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"model error {name} must be a relative deviation from 0 to below 1, not {getattr(self, name)!r}")

    def of(self, resource: str) -> float:
        """The error of a resource by the name that `simtrain.planner.resources` gives it."""
        fields = (self.compute, self.memory_bandwidth, self.link, self.host)
        return fields[RESOURCES.index(resource)]

    def margin(self, probability: float) -> float:
        """The share of memory that must stay free, so that running out has at most a probability: what is needed is log-normal."""
        return max(0.0, 1 - exp(-self.memory * NormalDist().inv_cdf(1 - probability)))

    def runs_out(self, result: Result) -> float:
        """Probability that a result does not fit."""
        room = log(result.memory.capacity_bytes / result.memory.device_bytes)
        return 1 - NormalDist().cdf(room / self.memory) if self.memory else float(room < 0)


@dataclass(frozen=True, slots=True)
class Outlook:
    """A finalist under errors.

    Attributes:
        strategy: As text.
        runtime: Name.
        step_time_s: The best guess.
        expected_s: Mean step time.
        worst_decile_s: Step time that is exceeded in one case of ten.
        chance_best: Probability that it is the fastest of the finalists per sample.
        chance_out: Probability that it runs out of memory.
    """

    strategy: str
    runtime: str
    step_time_s: float
    expected_s: float
    worst_decile_s: float
    chance_best: float
    chance_out: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


def check_robust(by: str, objective: str, jitter: float) -> None:
    """Checks what a choice is made by, before anything is searched.

    Raises:
        UnknownNameError: With the nearest.
        InputError: An objective that does not go with the step time, or jitter that cannot be or that nothing asks for.
    """
    if not jitter >= 0:
        raise InputError(f"jitter must not be negative, not {jitter!r}")
    if not by:
        if jitter:
            raise InputError("jitter decides in a robust choice only: give robust too (expected or worst_decile)")
        return
    if by not in CHOICES:
        raise UnknownNameError("robust choice", by, CHOICES)
    if objective not in TIMED:
        raise InputError(f"a robust choice is by what goes with the step time ({', '.join(TIMED)}), not by {objective}")


def settled(limits: Limits, error: ModelError) -> Limits:
    """The limits with the probability of running out of memory turned into the margin that it asks for."""
    if not limits.memory_risk:
        return limits
    return replace(limits, memory_margin=max(limits.memory_margin, error.margin(limits.memory_risk)))


def outlooks(
    workload: Workload,
    cluster: Cluster,
    finalists: Sequence[tuple[Candidate, Result]],
    *,
    error: ModelError,
    jitter: float = 0.0,
    seed: int = 0,
) -> tuple[Outlook, ...]:
    """Prices finalists under errors.

    Args:
        workload: What is trained.
        cluster: On what.
        finalists: Each with what was predicted.
        error: How far off predictions are.
        jitter: Relative standard deviation of each rank's computation in a step, of which every step waits for the slowest.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    shared = {name: rng.standard_normal(DRAWS) for name in RESOURCES}
    times = []
    for candidate, result in finalists:
        change = rng.standard_normal(DRAWS) * error.own
        for name, (worse, better) in _responses(workload, cluster, candidate, error).items():
            off = shared[name]
            change = change + np.where(off < 0, -off * worse, off * better)
        times.append(result.step_time_s * _slowest_of(result, jitter) * np.exp(change))
    return tuple(
        Outlook(
            strategy=str(candidate.strategy),
            runtime=candidate.runtime.name,
            step_time_s=result.step_time_s,
            expected_s=float(t.mean()),
            worst_decile_s=float(np.quantile(t, 0.9)),
            chance_best=chance,
            chance_out=error.runs_out(result),
        )
        for (candidate, result), t, chance in zip(finalists, times, _chances(finalists, times), strict=True)
    )


def _responses(workload: Workload, cluster: Cluster, candidate: Candidate, error: ModelError) -> dict[str, tuple[float, float]]:
    """By how much log step time grows with each resource one standard deviation worse, and one better: two lines that meet at none."""
    now_s = projected_s(estimate, workload, cluster, candidate)
    found: dict[str, tuple[float, float]] = {}
    for name in (name for name, _, _ in scaled(cluster, candidate.runtime, 1.0)):
        logs = []
        for sign in (-1, 1):
            machines = {n: (c, r) for n, c, r in scaled(cluster, candidate.runtime, exp(sign * error.of(name)))}[name]
            logs.append(log(projected_s(estimate, workload, machines[0], Candidate(candidate.strategy, machines[1])) / now_s))
        found[name] = (logs[0], logs[1])
    return found


def _slowest_of(result: Result, jitter: float) -> float:
    """What jitter makes of a step: its computation waits for the slowest of all ranks."""
    if not jitter:
        return 1.0
    share = sum(result.breakdown_s.get(part, 0.0) for part in ON_DEVICE) / result.step_time_s
    return 1 + share * jitter * expected_largest(result.devices)


def _chances(finalists: Sequence[tuple[Candidate, Result]], times: Sequence[FloatArray]) -> list[float]:
    if not finalists:
        return []
    per_sample = np.stack([t / r.global_batch for (_, r), t in zip(finalists, times, strict=True)])
    return [float(share) for share in np.bincount(per_sample.argmin(axis=0), minlength=len(finalists)) / DRAWS]


def order(found: Sequence[Outlook], results: Sequence[Result], objective: str, by: str) -> list[int]:
    """Places of finalists, best first.

    Args:
        found: Finalists under errors.
        results: The same as predicted.
        objective: One of those that go with the step time.
        by: "expected" or "worst_decile".
    """

    def value(i: int) -> float:
        time_s, result = float(getattr(found[i], f"{by}_s")), results[i]
        if objective == "step_time":
            return time_s
        return time_s / result.global_batch * (1.0 if objective == "throughput" else result.cost_usd / result.step_time_s)

    return sorted(range(len(found)), key=value)


__all__ = ["ModelError", "Outlook", "check_robust", "order", "outlooks", "settled"]
