"""Activation checkpointing: which layers form a segment that backward recomputes."""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.core.strategy import checkpoint_segment
from simtrain.core.workload import Workload


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive layers of a workload (repeats counted), recomputed together or not at all.

    Attributes:
        layers: Indices in forward order.
        kinds: For each of them, the index of its `Layer` in `workload.layers`.
        recomputed: Whether backward runs their forward pass again.
    """

    layers: tuple[int, ...]
    kinds: tuple[int, ...]
    recomputed: bool


def segments(workload: Workload, checkpoint: str) -> tuple[Segment, ...]:
    """Cuts a workload into segments.

    Runs of repeated layers are cut every K layers; layers that do not repeat (embedding, head) and layers that must not run twice are
    kept as they are.

    Args:
        workload: What is trained.
        checkpoint: "none", "full", "sqrt" or "every:K".
    """
    result: list[Segment] = []
    position = 0
    for kind, layer in enumerate(workload.layers):
        length = checkpoint_segment(checkpoint, layer.repeats) if layer.repeats > 1 and layer.safe_to_recompute else 0
        size = length or 1
        for start in range(0, layer.repeats, size):
            count = min(size, layer.repeats - start)
            indices = tuple(range(position + start, position + start + count))
            result.append(Segment(indices, (kind,) * count, recomputed=length > 0))
        position += layer.repeats
    return tuple(result)
