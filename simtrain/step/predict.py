"""The three readers, from fast to full: `estimate`, `schedule`, `simulate`. They share the program's costs and return one `Result`."""

from __future__ import annotations

from collections.abc import Mapping

from simtrain.core.hardware import Cluster
from simtrain.core.result import Result
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.step.adaptive import settle_precision
from simtrain.step.estimate import estimate_setting
from simtrain.step.remat_choice import settle
from simtrain.step.schedule import schedule_setting
from simtrain.step.setting import resolve


def estimate(workload: Workload | str, cluster: Cluster | str, strategy: Strategy | str, *, runtime: Runtime | str | None = None) -> Result:
    """Predicts a training step in closed form.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster, a preset, a TOML file, or devices such as `"8x a100-sxm-80g"`.
        strategy: A strategy, or its text such as `"data=4,micro_batch=2"`.
        runtime: What carries it out; eager PyTorch by default.

    Returns:
        Step time, memory and the rest; without a timeline.

    Raises:
        InputError: Unknown names, or a strategy that contradicts itself or the cluster.
        UnsupportedError: Something that is not modelled.
    """
    return estimate_setting(settle(settle_precision(resolve(workload, cluster, strategy, runtime))))


def schedule(workload: Workload | str, cluster: Cluster | str, strategy: Strategy | str, *, runtime: Runtime | str | None = None) -> Result:
    """Predicts a training step by longest path through its program, in the periodic steady state.

    Args and errors are those of `estimate`; the result carries a timeline of the step and of its memory.
    """
    return schedule_setting(settle(settle_precision(resolve(workload, cluster, strategy, runtime))))


def simulate(
    workload: Workload | str,
    cluster: Cluster | str,
    strategy: Strategy | str,
    *,
    runtime: Runtime | str | None = None,
    jitter: float = 0.0,
    stragglers: Mapping[int, float] | None = None,
    seed: int = 0,
    steps: int | None = None,
) -> Result:
    """Predicts a training step by discrete-event simulation, with disturbances.

    Args:
        workload: See `estimate`.
        cluster: See `estimate`.
        strategy: See `estimate`.
        runtime: See `estimate`.
        jitter: Relative standard deviation of compute time, drawn for every rank and step.
        stragglers: Factor on the compute time of single ranks, such as `{3: 1.2}`.
        seed: Of the random numbers.
        steps: Steps to average over; 20 with jitter, else 2.

    Raises:
        InputError: As `estimate`, or a disturbance out of range.
        UnsupportedError: Something that is not modelled.
    """
    from simtrain.step.simulate import simulate_setting

    setting = settle(settle_precision(resolve(workload, cluster, strategy, runtime)))
    return simulate_setting(setting, jitter=jitter, stragglers=stragglers, seed=seed, steps=steps)
