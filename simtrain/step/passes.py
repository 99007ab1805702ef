"""The order of passes in one micro-batch: forward through all layers, then backward with recomputation, in host program order."""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.core.result import MemoryKind
from simtrain.core.workload import Workload
from simtrain.step.occupancy import Mode, PassContext
from simtrain.step.remat import Segment, segments
from simtrain.step.specialize import ConcreteLayer


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through one layer.

    Attributes:
        layer: Position in the workload, repeats counted.
        kind: Index in `workload.layers`.
        mode: Forward, recompute or backward.
        context: What outlives it.
    """

    layer: int
    kind: int
    mode: Mode
    context: PassContext


def micro_batch_passes(workload: Workload, concrete: tuple[ConcreteLayer, ...], checkpoint: str, *, accumulating: bool) -> tuple[Pass, ...]:
    """Lists the passes of one micro-batch.

    Args:
        workload: What is trained.
        concrete: Its layers, specialized.
        checkpoint: Activation checkpointing.
        accumulating: Whether gradients of earlier micro-batches are there already.
    """
    cut = segments(workload, checkpoint)
    order = [(layer, kind, segment) for segment in cut for layer, kind in zip(segment.layers, segment.kinds, strict=True)]
    depth = len(order)
    kept_as = [_output_kind(i, order, concrete, depth) for i in range(depth)]
    forward: list[Pass] = []
    for i, (layer, kind, segment) in enumerate(order):
        first = layer == segment.layers[0]
        if segment.recomputed:
            inner = None if first or i == 0 else MemoryKind.TRANSIENT
            output = MemoryKind.TRANSIENT if layer != segment.layers[-1] else kept_as[i]
            context = PassContext(inner, output, last_of_segment=layer == segment.layers[-1], last_layer=i == depth - 1)
            forward.append(Pass(layer, kind, Mode.FORWARD_DROPPING, context))
        else:
            dropped = i > 0 and "x" not in concrete[kind].saved
            context = PassContext(kept_as[i - 1] if dropped else None, kept_as[i], last_layer=i == depth - 1)
            forward.append(Pass(layer, kind, Mode.FORWARD, context))
    backward: list[Pass] = []
    mode = Mode.BACKWARD_ACCUMULATING if accumulating else Mode.BACKWARD
    for segment in reversed(cut):
        members = list(zip(segment.layers, segment.kinds, strict=True))
        if segment.recomputed:
            for layer, kind in members:
                held = MemoryKind.RECOMPUTED if layer != segment.layers[0] else kept_as[layer - 1]
                input_kind = None if layer == 0 or "x" in concrete[kind].saved else held
                context = PassContext(input_kind, MemoryKind.RECOMPUTED, recomputed=True, last_of_segment=layer == segment.layers[-1])
                backward.append(Pass(layer, kind, Mode.RECOMPUTE, context))
        for layer, kind in reversed(members):
            backward.append(Pass(layer, kind, mode, _backward_context(layer, kind, segment.recomputed, segment.layers, kept_as, concrete)))
    return (*forward, *backward)


def _output_kind(i: int, order: list[tuple[int, int, Segment]], concrete: tuple[ConcreteLayer, ...], depth: int) -> MemoryKind:
    """What the output of layer `i` counts as outside a segment: saved if the next layer needs it in backward."""
    if i + 1 >= depth:
        return MemoryKind.TRANSIENT
    _, kind, segment = order[i + 1]
    return MemoryKind.ACTIVATION if segment.recomputed or "x" in concrete[kind].saved else MemoryKind.TRANSIENT


def _backward_context(
    layer: int,
    kind: int,
    recomputed: bool,
    members: tuple[int, ...],
    kept_as: list[MemoryKind],
    concrete: tuple[ConcreteLayer, ...],
) -> PassContext:
    if layer == 0 or "x" not in concrete[kind].saved:
        input_kind = None
    elif recomputed and layer != members[0]:
        input_kind = MemoryKind.RECOMPUTED
    else:
        input_kind = kept_as[layer - 1]
    last = layer == len(kept_as) - 1
    return PassContext(input_kind, kept_as[layer], recomputed=recomputed, last_of_segment=layer == members[-1], last_layer=last)
