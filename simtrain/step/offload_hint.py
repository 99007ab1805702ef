"""Whether moving something off the devices makes a strategy fit that does not fit: for those who search, and for error messages."""

from __future__ import annotations

from simtrain.core.errors import SimtrainError
from simtrain.core.hardware import Cluster
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.units import format_bytes, format_time
from simtrain.core.workload import Workload
from simtrain.step.estimate import estimate_setting
from simtrain.step.layout import lay_out
from simtrain.step.remat_choice import settle
from simtrain.step.results import memory_report
from simtrain.step.setting import resolve

LADDER = ("optimizer", "optimizer+gradients", "optimizer+gradients+parameters", "optimizer+gradients+parameters+activations")
"""What is tried, from the least moved to the most; weights need ZeRO stage 3."""


def fitting_offload(
    workload: Workload | str, cluster: Cluster | str, strategy: Strategy | str, *, runtime: Runtime | str | None = None
) -> Strategy | None:
    """The strategy with the least moved to the host, or else to drives, that fits; `None` if none does or the host is not known.

    Args:
        workload: See `simtrain.estimate`.
        cluster: See `simtrain.estimate`.
        strategy: One that does not fit.
        runtime: See `simtrain.estimate`.
    """
    how = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    for drives in (False, True):
        for parts in LADDER:
            offload = "+".join(f"{part}:nvme" if drives and part != "activations" else part for part in parts.split("+"))
            candidate = how.with_(offload=offload, zero=3 if "parameters" in parts else how.zero)
            try:
                setting = settle(resolve(workload, cluster, candidate, runtime))
                if memory_report(lay_out(setting)).fits:
                    return setting.strategy
            except SimtrainError:  # this one is not possible here, another may be
                continue
    return None


def offload_hint(
    workload: Workload | str, cluster: Cluster | str, strategy: Strategy | str, *, runtime: Runtime | str | None = None
) -> str:
    """Says what would have to move for a strategy to fit, and what a step would take then; empty where nothing helps.

    Args and meaning are those of `fitting_offload`.
    """
    found = fitting_offload(workload, cluster, strategy, runtime=runtime)
    if found is None:
        return ""
    result = estimate_setting(resolve(workload, cluster, found, runtime))
    with_zero = f" with zero={found.zero}" if "parameters" in found.offload else ""
    return (
        f"offload={found.offload}{with_zero} would fit: {format_bytes(result.memory.device_bytes)} on the device and "
        f"{format_bytes(result.memory.host_bytes)} on its host, {format_time(result.step_time_s)} a step"
    )


__all__ = ["fitting_offload", "offload_hint"]
