"""What a reader needs to know, resolved and checked: names turned into nouns, contradictions refused."""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.core import catalog
from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from simtrain.core.hardware import Cluster, Device
from simtrain.core.precision import Precision, precision
from simtrain.core.runtime import Runtime
from simtrain.core.runtime import runtime as find_runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.step.shard import stated_cuts


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """A checked question: this workload on these ranks, trained this way, by this runtime.

    Attributes:
        workload: What is trained.
        cluster: On what.
        strategy: How.
        precision: Number formats of the strategy.
        runtime: What carries it out.
        devices: Device of each rank used.
        cuts: Half-open ranges of layers of the pipeline's chunks; empty for even ones.
    """

    workload: Workload
    cluster: Cluster
    strategy: Strategy
    precision: Precision
    runtime: Runtime
    devices: tuple[Device, ...]
    cuts: tuple[tuple[int, int], ...] = ()


def resolve(workload: Workload | str, cluster: Cluster | str, strategy: Strategy | str, runtime: Runtime | str | None = None) -> Setting:
    """Turns names into nouns and refuses what cannot be or is not modelled.

    Raises:
        UnknownNameError: A name that no catalog holds.
        StrategyError: More ranks than devices.
        UnsupportedError: A form of parallelism that is not modelled, or arithmetic that a device lacks.
    """
    work = catalog.workload(workload) if isinstance(workload, str) else workload
    machines = catalog.cluster(cluster) if isinstance(cluster, str) else cluster
    how = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    _refuse_unmodelled(how)
    _refuse_sharded_frozen(work, how)
    if how.ranks > machines.size:
        raise StrategyError(_too_many(how, machines))
    devices = machines.devices[: how.ranks]
    recipe = precision(how.precision)
    for device in set(devices):
        device.peak(recipe.arithmetic)
    framework = _runtime(runtime, devices)
    _refuse_cpu_dropout(work, framework)
    return Setting(work, machines, how, recipe, framework, devices, stated_cuts(work, how.blocks_per_chunk))


def _runtime(given: Runtime | str | None, devices: tuple[Device, ...]) -> Runtime:
    on_cpu = all(d.device_class == "cpu" for d in devices)
    if given is None:
        return find_runtime("torch-eager-cpu" if on_cpu else "torch-eager")
    chosen = given if isinstance(given, Runtime) else find_runtime(given)
    if on_cpu != (chosen.run_ahead_launches == 0):
        where = "a CPU, where the host computes itself" if on_cpu else "an accelerator, fed by a host"
        raise InputError(f"runtime {chosen.name!r} does not run on {devices[0].name}: it is {where}")
    return chosen


def _refuse_cpu_dropout(workload: Workload, runtime: Runtime) -> None:
    if runtime.allocator == "exact" and any("dropout" in op.name for layer in workload.layers for op in layer.forward):
        raise UnsupportedError(f"{workload.name}: dropout on a CPU is not modelled (other kernels and masks than on GPUs); use dropout=0")


def _refuse_sharded_frozen(workload: Workload, strategy: Strategy) -> None:
    frozen = [p.name for layer in workload.layers for p in layer.parameters if not p.trained]
    if frozen and strategy.zero == 3:
        raise UnsupportedError(
            f"{workload.name}: sharding frozen parameters ({frozen[0]}, ...) is not modelled: use zero=0, 1 or 2, which keep them whole"
        )


def _too_many(strategy: Strategy, cluster: Cluster) -> str:
    degrees = {n: getattr(strategy, n) for n in ("data", "tensor", "context", "pipeline") if getattr(strategy, n) > 1}
    product = " x ".join(f"{n}={v}" for n, v in degrees.items())
    least = strategy.ranks // strategy.data
    fits = cluster.size // least
    fix = (
        f"use data={fits} or fewer"
        if fits
        else f"one replica needs {least} of them: lower {' or '.join(n for n in degrees if n != 'data')}"
    )
    return f"{product} needs {strategy.ranks} devices, but {cluster.name!r} has {cluster.size}: {fix}"


def _refuse_unmodelled(strategy: Strategy) -> None:
    if strategy.plan:
        raise UnsupportedError("strategies with an explicit plan of replicas are not modelled yet; use data, micro_batch and accumulation")
    holders = strategy.data * strategy.context
    if holders % strategy.expert:
        fits = max(d for d in range(1, strategy.expert) if holders % d == 0)
        raise StrategyError(
            f"expert={strategy.expert} must divide the {holders} ranks of data x context, from which expert ranks come: use expert={fits}"
        )
    if strategy.expert > 1 and (strategy.zero == 3 or strategy.shard):
        field = "zero=3" if strategy.zero == 3 else f"shard={strategy.shard}"
        raise UnsupportedError(
            f"{field} with expert={strategy.expert} is not modelled (experts would be sharded over other ranks than the rest): "
            "use zero=2 or less without shard, or expert=1"
        )
    if strategy.shard and (holders % strategy.shard or strategy.shard > holders):
        fits = max(d for d in range(1, min(strategy.shard, holders) + 1) if holders % d == 0)
        raise StrategyError(
            f"shard={strategy.shard} must divide the {holders} ranks that hold the same part of the model: use shard={fits}"
        )
    if strategy.shard and not strategy.zero:
        raise StrategyError("shard says over how many ranks ZeRO shards: give zero=1, 2 or 3 too")
