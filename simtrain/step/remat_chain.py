"""A workload as the chain of layers that `remat_optimal` plans for: what each pass of each layer holds, from the memory ledger's replay."""

from __future__ import annotations

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.runtime import Runtime
from simtrain.core.workload import Workload
from simtrain.step.occupancy import Mode, Occupancy, Sizer, occupancy, unsaved_cast_bytes
from simtrain.step.passes import Pass, micro_batch_passes
from simtrain.step.remat_plan import Chain
from simtrain.step.specialize import ConcreteLayer


def chain_of(
    workload: Workload,
    concrete: tuple[ConcreteLayer, ...],
    batch: int,
    runtime: Runtime,
    forward_s: FloatArray,
    last_s: FloatArray,
    *,
    accumulating: bool = False,
) -> Chain:
    """Lays a workload out as a chain.

    Every layer is replayed once kept and once recomputed on its own.

    Args:
        workload: What is trained.
        concrete: Its layers, specialized.
        batch: Samples of a micro-batch.
        runtime: Allocator and library.
        forward_s: Time of the forward pass of each layer, repeats counted.
        last_s: Time to recompute each as the last of its segment.
        accumulating: Whether gradients of earlier micro-batches are there already.
    """
    kept = {(p.layer, p.mode): p for p in micro_batch_passes(workload, concrete, "none", accumulating=accumulating)}
    dropping = {(p.layer, p.mode): p for p in micro_batch_passes(workload, concrete, "full", accumulating=accumulating)}
    backward_mode = Mode.BACKWARD_ACCUMULATING if accumulating else Mode.BACKWARD
    memo: dict[tuple[object, ...], Occupancy] = {}

    def replay(step: Pass) -> Occupancy:
        key = (step.kind, step.mode, step.context)
        if key not in memo:
            memo[key] = occupancy(concrete[step.kind], step.mode, step.context, sizer[step.kind])
        return memo[key]

    sizer = [Sizer(c, batch, workload.sequence, runtime) for c in concrete]
    depth = workload.depth
    forward = [kept[i, Mode.FORWARD] for i in range(depth)]
    kinds = [p.kind for p in forward]
    crossing = [float(sizer[k].crossing(concrete[k].layer, p.context.output_kind).sum()) for k, p in zip(kinds, forward, strict=True)]
    output = np.array([*crossing[:-1], 0.0])  # the last layer's output is its own to release
    x = np.append(0.0, output[:-1])
    casts = np.array([float(unsaved_cast_bytes(concrete[k], Mode.FORWARD, sizer[k]).sum()) for k in kinds])
    keeps_input = np.array([p.context.input_kind is None for p in forward]) & (x > 0)
    ahead = [replay(p) for p in forward]
    back = [replay(kept[i, backward_mode]) for i in range(depth)]
    drop = [replay(dropping.get((i, Mode.FORWARD_DROPPING), forward[i])) for i in range(depth)]
    net = np.array([float(o.net.sum()) for o in ahead])
    saved = net - casts - output + np.where(keeps_input, 0.0, x)
    held = saved + np.where(keeps_input, x, 0.0)
    left = np.array([float(o.net.sum()) for o in back]) + held + output - x
    return Chain(
        forward_s=forward_s,
        last_s=last_s,
        input_bytes=x,
        output_gradient_bytes=output,
        saved_bytes=saved,
        keeps_input=keeps_input,
        forward_peak_bytes=_peaks(ahead),
        dropping_peak_bytes=_peaks(drop),
        backward_peak_bytes=_peaks(back),
        left_bytes=left,
        recomputable=np.array([(i, Mode.FORWARD_DROPPING) in dropping for i in range(depth)]),
        until_loss_bytes=casts,
        dropping_until_loss_bytes=np.array([float(unsaved_cast_bytes(concrete[k], Mode.FORWARD_DROPPING, sizer[k]).sum()) for k in kinds]),
    )


def _peaks(passes: list[Occupancy]) -> FloatArray:
    return np.array([float(max(p.moments.sum(axis=1).max(initial=0.0), 0.0)) for p in passes])
