"""`plan`: searches the strategies that make sense, ranks what fits, and says of the rest what would make it fit.

The search goes from cheap to dear: a lower bound of the step time for everything (`screen`), memory for what the bound leaves,
`estimate` for what fits, `schedule` and at last `simulate` for the best. A strategy is passed over only when its bound shows that it
cannot be among the best; how many were, and why the rest failed, is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.hardware import Cluster
from simtrain.core.runtime import Runtime
from simtrain.core.runtimes import runtime as find_runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.planner.evidence import nearest
from simtrain.planner.found import Failure, Plan
from simtrain.planner.objectives import OBJECTIVES, PRICED, Judge, Limits, Objective, Weights, check_degrees, weights_of
from simtrain.planner.robust import FINALISTS, ModelError, check_robust, order, outlooks, settled
from simtrain.planner.rounds import PATIENCE_S, Search
from simtrain.planner.space import Block, Candidate, Wishes, blocks, check_fixed, default_runtimes, merged
from simtrain.planner.why import feasible, near_limits, why

T = TypeVar("T")


def plan(
    workload: Workload | str,
    cluster: Cluster | str,
    global_batch: int | Sequence[int],
    *,
    objective: Objective | Sequence[Objective] = "throughput",
    precisions: Sequence[str] | None = None,
    checkpoints: Sequence[str] | None = None,
    zeros: Sequence[int] | None = None,
    optimizer: str = "adamw",
    runtime: Runtime | str | Sequence[Runtime | str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    devices: int | None = None,
    limits: Limits | None = None,
    weights: Weights | Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    patience_s: float = PATIENCE_S,
    explain: bool = False,
    robust: str = "",
    jitter: float = 0.0,
    model_error: ModelError | None = None,
) -> Plan:
    """Searches data, tensor, pipeline and context degrees, micro-batch, ZeRO, checkpointing and schedule for a global batch.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster or its text.
        global_batch: Samples per step, or several to choose from.
        objective: What to optimise; several give a Pareto front, ranked by the first.
        precisions: Recipes to try; by default what is customary with the runtime and every device has arithmetic for.
        checkpoints: Checkpointing to try.
        zeros: ZeRO stages to try (stages above 0 only with more than one replica).
        optimizer: Which one.
        runtime: What carries it out, or several to choose from; eager PyTorch, FSDP2 and, for what has attention, Megatron-LM by default.
        fixed: Fields of the strategy with the value they must have, such as `{"tensor": 8}`.
        devices: How many of the cluster's devices to use; all by default.
        limits: What to keep to: memory with a margin or a probability of running out, power, budget, deadline.
        weights: Of the balanced score.
        progress: Called with (done, total).
        patience_s: When to stop; the plan then says how many combinations were not looked at.
        explain: Whether to price the best anew with more of each resource and with single choices changed, or where nothing fits to look
            for what would.
        robust: "expected" or "worst_decile" to choose among the finalists by that under errors of the model and jitter, not by the best
            guess; "" for the best guess. Only for objectives that go with the step time.
        jitter: Relative standard deviation of each rank's computation, for a robust choice.
        model_error: How far off predictions are, for a robust choice and for `memory_risk`.

    Raises:
        StrategyError: The global batch does not divide over the devices, or fixed fields contradict something.
        UnknownNameError: Of a workload, cluster, precision, runtime or objective.
        InputError: There is nothing to try, or limits contradict each other.
    """
    judge = Judge((objective,) if isinstance(objective, str) else tuple(objective), weights_of(weights))
    work = catalog.workload(workload) if isinstance(workload, str) else workload
    machines = catalog.cluster(cluster) if isinstance(cluster, str) else cluster
    errors = model_error or ModelError()
    kept_to = settled(limits or Limits(), errors)
    _check_prices(machines, judge, kept_to)
    check_robust(robust, judge.objectives[0], jitter)
    wishes = Wishes(
        *(_listed(precisions), _listed(checkpoints), _listed(zeros), optimizer),
        devices=machines.size if devices is None else devices,
        fixed=check_fixed(fixed or {}),
        customary=runtime is None,
    )
    batches = (global_batch,) if isinstance(global_batch, int) else tuple(global_batch)
    frameworks = default_runtimes(machines, work) if runtime is None else _runtimes(runtime)
    space = _space(work, machines, batches, frameworks, wishes)
    found = Search(work, machines, space, judge, kept_to, progress, patience_s).run(batches[0])
    if robust and found.best is not None:
        found = _robust(found, work, machines, frameworks, robust, errors, jitter)
    return _explained(found, work, machines, frameworks, kept_to) if explain else found


def _space(
    workload: Workload, cluster: Cluster, batches: Sequence[int], frameworks: Sequence[Runtime], wishes: Wishes
) -> tuple[Block, ...]:
    """What is searched: the blocks of all global batches."""
    if not batches:
        raise InputError("give at least one global batch")
    check_degrees(wishes.fixed, wishes.devices, batches)
    return merged([block for batch in batches for block in blocks(workload, cluster, batch, frameworks, wishes)[0]])


def _explained(found: Plan, workload: Workload, cluster: Cluster, frameworks: Sequence[Runtime], limits: Limits) -> Plan:
    """The plan with reasons of the best and how sure it is, or where nothing fits with what would."""
    if found.best is None:
        advice = near_limits(found.failed) or feasible(workload, cluster, found.global_batch, limits)
        return replace(found, advice=advice)
    framework = next(r for r in frameworks if r.name == found.best.runtime)
    reasons = why(workload, cluster, found.best.strategy, runtime=framework, margin=limits.memory_margin)
    return replace(found, why=reasons, evidence=nearest(workload, cluster, Strategy.parse(found.best.strategy)))


def _robust(
    found: Plan, workload: Workload, cluster: Cluster, frameworks: Sequence[Runtime], by: str, errors: ModelError, jitter: float
) -> Plan:
    """The plan with its finalists in the order of what holds when the model errs."""
    finalists, rest = found.ranked[:FINALISTS], found.ranked[FINALISTS:]
    by_name = {r.name: r for r in frameworks}
    asked = [(Candidate(Strategy.parse(r.strategy), by_name[r.runtime]), r) for r in finalists]
    seen = outlooks(workload, cluster, asked, error=errors, jitter=jitter)
    places = order(seen, finalists, found.objective, by)
    return replace(
        found,
        ranked=(*(finalists[i] for i in places), *rest),
        outlooks=tuple(seen[i] for i in places),
        notes=(*found.notes, f"the first {len(finalists)} are in the order of the {by.replace('_', ' ')} under errors of the model"),
    )


def _check_prices(cluster: Cluster, judge: Judge, limits: Limits) -> None:
    unpriced = sorted({d.name for d in cluster.devices if d.price_usd_per_hour <= 0})
    if unpriced and (limits.budget_usd or any(o in PRICED for o in judge.objectives)):
        raise InputError(f"no price is known of {', '.join(unpriced)}: plan for throughput or energy, or give a device file with a price")


def _listed(choices: Sequence[T] | None) -> tuple[T, ...] | None:
    return None if choices is None else tuple(choices)


def _runtimes(given: Runtime | str | Sequence[Runtime | str]) -> tuple[Runtime, ...]:
    listed = (given,) if isinstance(given, str | Runtime) else tuple(given)
    return tuple(r if isinstance(r, Runtime) else find_runtime(r) for r in listed)


__all__ = ["OBJECTIVES", "Failure", "Plan", "plan"]
