"""Plans of replicas that a `Strategy` states in full, read as allocations are: replicas may differ in their stages and their share."""

from __future__ import annotations

from dataclasses import fields

from simtrain.core.errors import StrategyError, UnknownNameError, UnsupportedError
from simtrain.core.hardware import Cluster
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import ReplicaGroup, ReplicaTemplate, StageTemplate, Strategy
from simtrain.core.workload import Workload
from simtrain.planner.allocation.allocate import Allocator
from simtrain.planner.allocation.prices import Share, StageUse, Template, Unit
from simtrain.planner.allocation.result import Allocation

READ = ("precision", "optimizer", "checkpoint", "zero", "sequence_parallel", "plan")
"""Fields of a strategy that are read beside a plan; what its replicas are is said by the plan itself."""


def read_plan(workload: Workload | str, cluster: Cluster | str, strategy: Strategy, *, runtime: Runtime | str | None = None) -> Allocation:
    """Reads a strategy with a plan of replicas, whether they are equal or not.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster or its text.
        strategy: With a `plan`; of its other fields precision, optimizer, checkpoint, zero (0 or 1) and sequence_parallel count.
        runtime: What carries it out; eager PyTorch by default.

    Returns:
        The plan placed on the cluster and lowered into the engine's own program, as its `schedule` reads it, with a lower bound.

    Raises:
        StrategyError: No plan, or one that leaves a layer out.
        UnknownNameError: A device that the cluster has not.
        UnsupportedError: Something that is not modelled beside a plan.
        InputError: Stages that do not go into the nodes.
    """
    if not strategy.plan:
        raise StrategyError("the strategy has no plan of replicas: give plan=(ReplicaGroup(...), ...), or use st.schedule")
    _refuse_others(strategy)
    stages = [stage for group in strategy.plan for stage in group.template.stages]
    asked = Allocator(
        workload,
        cluster,
        strategy.global_batch,
        precision=strategy.precision,
        optimizer=strategy.optimizer,
        runtime=runtime,
        tensors=sorted({stage.tensor for stage in stages}),
        micro_batches=sorted({group.template.micro_batch for group in strategy.plan}),
        checkpoints=sorted({stage.checkpoint or strategy.checkpoint for stage in stages}),
        zeros=(strategy.zero,),
        sequences=(strategy.sequence_parallel,),
        templates=False,
    )
    return asked.evaluate([_share(asked, strategy, group) for group in strategy.plan], zero=strategy.zero)


def stated(allocation: Allocation, optimizer: str = "adamw") -> Strategy:
    """The strategy of an allocation, which `read_plan` reads again.

    Args:
        allocation: What `allocate` returned.
        optimizer: With which it was asked for.

    Raises:
        UnsupportedError: Stages with recipes of their own, or replicas of which only some split the sequence: a strategy has one of each.
    """
    units = [stage.unit for p in allocation.placement for stage in p.share.template.stages]
    recipes = sorted({unit.precision or allocation.precisions[unit.kind] for unit in units})
    sequence = {unit.sequence for unit in units if unit.tensor > 1}
    if len(recipes) > 1 or len(sequence) > 1:
        raise UnsupportedError(
            f"a strategy has one precision and one sequence_parallel, the allocation runs {' and '.join(recipes)}"
            + ", and only some of its tensor-parallel replicas split the sequence" * (len(sequence) > 1)
        )
    plan = tuple(
        ReplicaGroup(
            ReplicaTemplate(
                tuple(
                    StageTemplate(s.unit.kind, (s.start, s.end), s.unit.tensor, checkpoint=s.unit.checkpoint)
                    for s in p.share.template.stages
                ),
                p.share.template.micro_batch,
            ),
            p.share.copies,
            p.share.micro_batches,
        )
        for p in allocation.placement
    )
    return Strategy(precision=recipes[0], optimizer=optimizer, zero=allocation.zero, sequence_parallel=True in sequence, plan=plan)


def _refuse_others(strategy: Strategy) -> None:
    other = [f.name for f in fields(strategy) if f.name not in READ and getattr(strategy, f.name) != f.default]
    if other:
        given = " and ".join(f"{name}={getattr(strategy, name)}" for name in other)
        raise UnsupportedError(f"{given} beside a plan of replicas is not modelled: only {', '.join(READ)} are read")
    for stage in (s for group in strategy.plan for s in group.template.stages):
        for name in ("context", "expert"):
            if getattr(stage, name) > 1:
                raise UnsupportedError(f"a stage with {name}={getattr(stage, name)} in a plan of replicas is not modelled: use {name}=1")


def _share(asked: Allocator, strategy: Strategy, group: ReplicaGroup) -> Share:
    kinds = {name.lower(): name for name in asked.job.kinds}
    uses = []
    for stage in group.template.stages:
        if not stage.device and len(kinds) > 1:
            raise StrategyError(f"{group} does not say on which devices its stages run: name one of {', '.join(kinds.values())}")
        kind = kinds.get(stage.device.lower() or next(iter(kinds)))
        if kind is None:
            raise UnknownNameError("device of the cluster", stage.device, kinds.values())
        unit = Unit(kind, stage.tensor, stage.checkpoint or strategy.checkpoint, strategy.sequence_parallel and stage.tensor > 1)
        start, end = stage.layers
        uses.append(StageUse(unit, start, asked.market.layers if end < 0 else end))
    return Share(Template(tuple(uses), group.template.micro_batch), group.copies, group.micro_batches)
