"""Activation checkpointing: which layers form a segment that backward recomputes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

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

    Runs of blocks are cut every K of them; layers that are no blocks (embedding, stem, head) and layers that must not run twice are
    kept as they are.

    Args:
        workload: What is trained.
        checkpoint: "none", "full", "sqrt" or "every:K".
    """
    layers = [(kind, layer.block and layer.safe_to_recompute) for kind, layer in enumerate(workload.layers) for _ in range(layer.repeats)]
    result: list[Segment] = []
    for recomputable, run in groupby(enumerate(layers), key=lambda item: item[1][1]):
        members = list(run)
        length = checkpoint_segment(checkpoint, len(members)) if recomputable else 0
        for start in range(0, len(members), length or 1):
            part = members[start : start + (length or 1)]
            result.append(Segment(tuple(i for i, _ in part), tuple(kind for _, (kind, _) in part), recomputed=length > 0))
    return tuple(result)
