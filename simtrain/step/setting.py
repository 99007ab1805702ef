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
    """

    workload: Workload
    cluster: Cluster
    strategy: Strategy
    precision: Precision
    runtime: Runtime
    devices: tuple[Device, ...]


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
    if how.ranks > machines.size:
        raise StrategyError(
            f"data={how.data} needs {how.ranks} devices, but {machines.name!r} has {machines.size}: use data={machines.size} or fewer"
        )
    devices = machines.devices[: how.ranks]
    recipe = precision(how.precision)
    for device in set(devices):
        device.peak(recipe.arithmetic)
    framework = _runtime(runtime, devices)
    _refuse_cpu_dropout(work, framework)
    return Setting(work, machines, how, recipe, framework, devices)


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


def _refuse_unmodelled(strategy: Strategy) -> None:
    if strategy.plan:
        raise UnsupportedError("strategies with an explicit plan of replicas are not modelled yet; use data, micro_batch and accumulation")
    for name in ("tensor", "pipeline", "context", "expert"):
        if getattr(strategy, name) != 1:
            raise UnsupportedError(f"{name} parallelism is not modelled yet: {name} must be 1, not {getattr(strategy, name)}")
    if strategy.zero > 1:
        raise UnsupportedError(f"ZeRO stage {strategy.zero} is not modelled yet: zero must be 0 or 1")
