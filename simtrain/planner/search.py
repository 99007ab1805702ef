"""`plan`: try every combination that makes sense, rank what fits, and say of the rest what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from simtrain.core import catalog
from simtrain.core.errors import InputError, StrategyError, UnknownNameError, UnsupportedError
from simtrain.core.hardware import Cluster
from simtrain.core.precision import PRECISIONS
from simtrain.core.result import Result
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.step.predict import schedule

Objective = Literal["throughput", "step_time", "memory", "energy", "cost"]

OBJECTIVES: dict[str, Callable[[Result], float]] = {
    "throughput": lambda r: -r.samples_per_s,
    "step_time": lambda r: r.step_time_s,
    "memory": lambda r: r.memory.device_bytes,
    "energy": lambda r: r.energy_j / r.global_batch,
    "cost": lambda r: r.cost_usd / r.global_batch,
}
"""What each objective minimises (energy and cost per sample)."""

CHECKPOINTS = ("none", "every:2", "sqrt", "full")
DEFAULT_PRECISIONS = ("fp32", "tf32", "fp16-amp", "bf16-amp")


@dataclass(frozen=True, slots=True)
class Failure:
    """A combination that does not work, and why.

    Attributes:
        strategy: As text.
        reason: In words.
        over_bytes: By how much it exceeds the device's memory (0 if that is not the reason).
        term: The memory kind that takes most ("" if that is not the reason).
        smallest_change: The fitting combination that differs in the fewest choices, as text ("" if there is none).
        smallest_change_samples_per_s: Its throughput.
    """

    strategy: str
    reason: str
    over_bytes: float = 0.0
    term: str = ""
    smallest_change: str = ""
    smallest_change_samples_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the search found.

    Attributes:
        workload: Name.
        cluster: Name.
        global_batch: Samples per step.
        objective: What was optimised.
        considered: Combinations tried.
        ranked: What fits, best first.
        failed: What does not, nearest to fitting first.
    """

    workload: str
    cluster: str
    global_batch: int
    objective: str
    considered: int
    ranked: tuple[Result, ...]
    failed: tuple[Failure, ...]

    @property
    def best(self) -> Result | None:
        """The winner, or `None` if nothing fits."""
        return self.ranked[0] if self.ranked else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "workload": self.workload,
            "cluster": self.cluster,
            "global_batch": self.global_batch,
            "objective": self.objective,
            "considered": self.considered,
            "ranked": [r.to_dict() for r in self.ranked],
            "failed": [{name: getattr(f, name) for name in Failure.__dataclass_fields__} for f in self.failed],
        }


def plan(
    workload: Workload | str,
    cluster: Cluster | str,
    global_batch: int,
    *,
    objective: Objective = "throughput",
    precisions: Sequence[str] | None = None,
    checkpoints: Sequence[str] | None = None,
    zeros: Sequence[int] = (0, 1),
    optimizer: str = "adamw",
    runtime: Runtime | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Tries all combinations of micro-batch, accumulation, precision, checkpointing and ZeRO stage for a global batch.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster or its text; all of its devices are used.
        global_batch: Samples per step; must divide evenly over the devices.
        objective: What to optimise.
        precisions: Recipes to try; by default those that every device of the cluster has arithmetic for.
        checkpoints: Checkpointing to try.
        zeros: ZeRO stages to try (stages above 0 only with more than one device).
        optimizer: Which one.
        runtime: What carries it out.
        progress: Called with (done, total).

    Raises:
        StrategyError: The global batch does not divide over the devices.
        UnknownNameError: Of a workload, cluster, precision or objective.
        InputError: There is nothing to try.
    """
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    work = catalog.workload(workload) if isinstance(workload, str) else workload
    machines = catalog.cluster(cluster) if isinstance(cluster, str) else cluster
    recipes = tuple(precisions) if precisions is not None else _available(machines)
    choices = list(_space(machines.size, global_batch, recipes, tuple(checkpoints or CHECKPOINTS), tuple(zeros), optimizer))
    if not choices:
        raise InputError("there is nothing to try: give at least one precision, one checkpointing choice and one ZeRO stage")
    fitting: list[tuple[Strategy, Result]] = []
    full: list[tuple[Strategy, Result]] = []
    refused: list[Failure] = []
    for done, strategy in enumerate(choices, start=1):
        try:
            result = schedule(work, machines, strategy, runtime=runtime)
            (fitting if result.fits else full).append((strategy, result))
        except UnsupportedError as error:
            refused.append(Failure(str(strategy), str(error)))
        if progress is not None:
            progress(done, len(choices))
    key = OBJECTIVES[objective]
    ranked = sorted((r for _, r in fitting), key=key)
    failed = sorted((_explain(s, r, fitting) for s, r in full), key=lambda f: f.over_bytes)
    return Plan(work.name, machines.name, global_batch, objective, len(choices), tuple(ranked), (*failed, *refused))


def _available(cluster: Cluster) -> tuple[str, ...]:
    return tuple(n for n in DEFAULT_PRECISIONS if all(PRECISIONS[n].arithmetic in d.peak_flops for d in cluster.devices))


def _space(
    devices: int, global_batch: int, precisions: tuple[str, ...], checkpoints: tuple[str, ...], zeros: tuple[int, ...], optimizer: str
) -> Iterator[Strategy]:
    if global_batch < 1:
        raise StrategyError(f"the global batch must be at least 1, not {global_batch}")
    if global_batch % devices:
        below = global_batch // devices * devices
        near = " or ".join(str(n) for n in (below, below + devices) if n > 0)
        raise StrategyError(f"a global batch of {global_batch} does not divide over {devices} devices: use {near}")
    per_device = global_batch // devices
    stages = [z for z in zeros if z == 0 or devices > 1]
    for micro_batch in (m for m in range(1, per_device + 1) if per_device % m == 0):
        for recipe in precisions:
            for checkpoint in checkpoints:
                for zero in stages:
                    yield Strategy(
                        data=devices,
                        micro_batch=micro_batch,
                        accumulation=per_device // micro_batch,
                        precision=recipe,
                        optimizer=optimizer,
                        checkpoint=checkpoint,
                        zero=zero,
                    )


def _difference(a: Strategy, b: Strategy) -> int:
    """Choices in which two strategies differ; micro-batch and accumulation are one choice under a fixed global batch."""
    return sum(getattr(a, name) != getattr(b, name) for name in ("micro_batch", "precision", "checkpoint", "zero"))


def _explain(strategy: Strategy, result: Result, fitting: list[tuple[Strategy, Result]]) -> Failure:
    kinds = result.memory.by_kind_bytes
    term = max(kinds, key=lambda k: kinds[k])
    near = min(fitting, key=lambda pair: (_difference(strategy, pair[0]), -pair[1].samples_per_s), default=None)
    return Failure(
        strategy=str(strategy),
        reason=f"out of memory by {result.memory.over_bytes / 2**30:.2f} GiB at {result.memory.peak_moment}",
        over_bytes=result.memory.over_bytes,
        term=term,
        smallest_change=str(near[0]) if near else "",
        smallest_change_samples_per_s=near[1].samples_per_s if near else 0.0,
    )
