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


def micro_batch_passes(
    workload: Workload, concrete: tuple[ConcreteLayer, ...], checkpoint: str, *, accumulating: bool, receives: bool = False
) -> tuple[Pass, ...]:
    """Lists the passes of one micro-batch through a model, or through the layers of it that a rank holds.

    Args:
        workload: What is trained, or the layers held.
        concrete: Its layers, specialized.
        checkpoint: Activation checkpointing.
        accumulating: Whether gradients of earlier micro-batches are there already.
        receives: Whether the first layer's input comes from another rank and is this rank's to release.
    """
    cut = segments(workload, checkpoint)
    order = [(layer, kind, segment) for segment in cut for layer, kind in zip(segment.layers, segment.kinds, strict=True)]
    depth = len(order)
    kept_as: list[MemoryKind | None] = [_output_kind(i, order, concrete, depth) for i in range(depth)]
    kept_as.append(received_kind(order[0][2], concrete) if receives else None)  # so that [-1] is what came in
    forward: list[Pass] = []
    for i, (layer, kind, segment) in enumerate(order):
        first, ends = layer == segment.layers[0], i == depth - 1 and not _reads_own_output(order[i], concrete)
        if segment.recomputed:
            inner = None if first else MemoryKind.TRANSIENT
            output = MemoryKind.TRANSIENT if layer != segment.layers[-1] else _known(kept_as[i])
            context = PassContext(inner, output, last_of_segment=layer == segment.layers[-1], last_layer=ends)
            forward.append(Pass(layer, kind, Mode.FORWARD_DROPPING, context))
        else:
            dropped = "x" not in concrete[kind].saved and not (i and _reads_own_output(order[i - 1], concrete))
            context = PassContext(kept_as[i - 1] if dropped else None, _known(kept_as[i]), last_layer=ends)
            forward.append(Pass(layer, kind, Mode.FORWARD, context))
    backward: list[Pass] = []
    mode = Mode.BACKWARD_ACCUMULATING if accumulating else Mode.BACKWARD
    for segment in reversed(cut):
        members = list(zip(segment.layers, segment.kinds, strict=True))
        if segment.recomputed:
            for layer, kind in members:
                # what a segment starts from stays until its last saved tensor has been read in backward
                inside = layer != segment.layers[0]
                input_kind = MemoryKind.RECOMPUTED if inside and "x" not in concrete[kind].saved else None
                context = PassContext(input_kind, MemoryKind.RECOMPUTED, recomputed=True, last_of_segment=layer == segment.layers[-1])
                backward.append(Pass(layer, kind, Mode.RECOMPUTE, context))
        for layer, kind in reversed(members):
            backward.append(Pass(layer, kind, mode, _backward_context(layer, order, kept_as, concrete)))
    return (*forward, *backward)


def received_kind(first: Segment, concrete: tuple[ConcreteLayer, ...]) -> MemoryKind:
    """What a received input counts as: saved if backward needs it."""
    return MemoryKind.ACTIVATION if first.recomputed or "x" in concrete[first.kinds[0]].saved else MemoryKind.TRANSIENT


def _known(kind: MemoryKind | None) -> MemoryKind:
    return MemoryKind.TRANSIENT if kind is None else kind


def _output_kind(i: int, order: list[tuple[int, int, Segment]], concrete: tuple[ConcreteLayer, ...], depth: int) -> MemoryKind:
    """What the output of layer `i` counts as outside a segment: saved if this or the next layer needs it in backward."""
    own = _reads_own_output(order[i], concrete)
    if i + 1 >= depth:
        return MemoryKind.ACTIVATION if own else MemoryKind.TRANSIENT
    _, kind, segment = order[i + 1]
    return MemoryKind.ACTIVATION if own or segment.recomputed or "x" in concrete[kind].saved else MemoryKind.TRANSIENT


def _reads_own_output(place: tuple[int, int, Segment], concrete: tuple[ConcreteLayer, ...]) -> bool:
    """Whether a layer's backward pass reads the output of its forward pass (and not of its recomputation)."""
    _, kind, segment = place
    return not segment.recomputed and "y" in concrete[kind].saved


def _backward_context(
    place: int,
    order: list[tuple[int, int, Segment]],
    kept_as: list[MemoryKind | None],
    concrete: tuple[ConcreteLayer, ...],
) -> PassContext:
    """What the backward pass of a layer releases: its input, unless the layer before reads it once more, and such an output of its own."""
    layer, kind, segment = order[place]
    inside = segment.recomputed and layer != segment.layers[0]
    before = order[place - 1]
    # a recomputed segment makes its own copy of its last output
    needed_before = place > 0 and ("y" in concrete[before[1]].saved if inside else _reads_own_output(before, concrete))
    mine = ("x" in concrete[kind].saved or (segment.recomputed and not inside)) and not needed_before
    held = MemoryKind.RECOMPUTED if inside else kept_as[place - 1]
    return PassContext(
        held if mine else None,
        MemoryKind.RECOMPUTED if segment.recomputed else _known(kept_as[place]),
        recomputed=segment.recomputed,
        last_of_segment=layer == segment.layers[-1],
        last_layer=place == len(order) - 1 and not _reads_own_output(order[place], concrete),
        releases_output="y" in concrete[kind].saved,
    )
