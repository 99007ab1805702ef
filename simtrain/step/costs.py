"""Costs of passes: device time, host time, and how they interlock, for every distinct pass of a rank's step.

All three readers use these arrays; they differ only in how they compose them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simtrain.core.catalog import compute_model
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.program import TermKind
from simtrain.core.runtime import Runtime
from simtrain.step.kernels import accumulation_kernels, bucket_copy_kernels, operator_kernels
from simtrain.step.occupancy import Mode
from simtrain.step.specialize import ConcreteLayer, recomputed_operators

TERM_KINDS = {
    Mode.FORWARD: TermKind.FORWARD,
    Mode.FORWARD_DROPPING: TermKind.FORWARD,
    Mode.RECOMPUTE: TermKind.RECOMPUTE,
    Mode.BACKWARD: TermKind.BACKWARD,
    Mode.BACKWARD_ACCUMULATING: TermKind.BACKWARD,
}


@dataclass(frozen=True, slots=True)
class PassCost:
    """What a sequence of kernels costs a device fed by a host.

    The host issues kernels in order, the device runs them in order: kernel j starts at `max(end of j-1, issue time of j)`. That
    recursion composes over kernels into two numbers beside the plain sums.

    Attributes:
        device_s: Sum of the kernels' device times.
        host_s: Time the host needs to issue them.
        lead_s: How long after the host starts issuing the device must start, so that it never waits inside the pass.
        launches: Kernels issued.
    """

    device_s: float
    host_s: float
    lead_s: float
    launches: int


def pass_cost(device: Device, kernels: KernelBatch, runtime: Runtime) -> PassCost:
    """Prices kernels on a device and composes them with the host's launch stream."""
    if len(kernels) == 0:
        return PassCost(0.0, 0.0, 0.0, 0)
    times = compute_model(device.compute_model).kernel_times_s(device, kernels)
    return interlock(times, kernels.launches * runtime.launch_s, int(kernels.launches.sum()))


def interlock(device_times_s: np.ndarray, host_times_s: np.ndarray, launches: int) -> PassCost:
    """Composes per-kernel device and host times.

    The device ends at `max_j (issued_j + sum_{k >= j} t_k)` if it was idle; it starts that much before the end minus its own sum.
    """
    issued = np.cumsum(host_times_s)
    remaining = np.cumsum(device_times_s[::-1])[::-1]
    total = float(remaining[0])
    end = float(np.max(issued + remaining))
    return PassCost(total, float(issued[-1]), max(end - total, 0.0), launches)


@lru_cache(maxsize=20_000)
def layer_pass_cost(
    device: Device,
    concrete: ConcreteLayer,
    mode: Mode,
    last_of_segment: bool,
    batch: int,
    sequence: int,
    runtime: Runtime,
    copies_to_buckets: bool,
) -> PassCost:
    """Cost of one pass of a layer.

    Args:
        device: Where.
        concrete: The layer, specialized.
        mode: Forward, recompute or backward (accumulating backward adds gradients to those of earlier micro-batches).
        last_of_segment: Recomputation of the last layer of a segment stops early.
        batch: Samples.
        sequence: Sequence length.
        runtime: Launch cost.
        copies_to_buckets: Whether backward copies each gradient into a reduction bucket.
    """
    if mode in (Mode.BACKWARD, Mode.BACKWARD_ACCUMULATING):
        operators = concrete.backward
    elif mode is Mode.RECOMPUTE:
        operators = recomputed_operators(concrete, last_of_segment=last_of_segment)
    else:
        operators = concrete.forward
    parts = [operator_kernels(operators, concrete, batch, sequence)] if operators else []
    if mode is Mode.BACKWARD_ACCUMULATING:
        parts.append(accumulation_kernels(concrete.layer, concrete.precision))
    if copies_to_buckets:
        elements = [p.elements for p in concrete.layer.parameters if p.tied_to is None]
        parts.append(bucket_copy_kernels(elements, concrete.precision))
    costs = [pass_cost(device, kernels, runtime) for kernels in parts if len(kernels)]
    if mode is Mode.RECOMPUTE:
        costs.insert(0, _hooks(device, len(concrete.saved), runtime))
    return chain(costs)


def _hooks(device: Device, saved: int, runtime: Runtime) -> PassCost:
    """What checkpointing costs the host beside recomputation; a host that computes itself pays with its own time."""
    seconds = saved * device.profile.get("recompute.launch_s", runtime.recompute_s)
    return PassCost(0.0, seconds, 0.0, 0) if runtime.run_ahead_launches else PassCost(seconds, 0.0, 0.0, 0)


def chain(costs: list[PassCost]) -> PassCost:
    """Composes passes that follow each other on the same host and device."""
    device_s = host_s = lead_s = 0.0
    launches = 0
    for cost in costs:
        # the device must start late enough for the passes before and for this one
        lead_s = max(lead_s, host_s + cost.lead_s - device_s)
        device_s += cost.device_s
        host_s += cost.host_s
        launches += cost.launches
    return PassCost(device_s, host_s, max(lead_s, 0.0), launches)
