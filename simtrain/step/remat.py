"""Activation checkpointing: which layers form a segment that backward recomputes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from simtrain.core.checkpoint import is_explicit, is_optimal, parse_blocks
from simtrain.core.errors import InternalError, StrategyError
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
        checkpoint: As a strategy says it; an optimal choice must have been made already.

    Raises:
        StrategyError: Explicit blocks that the model lacks, or that must not run twice.
    """
    if is_optimal(checkpoint):
        raise InternalError("which layers to recompute was not chosen yet")
    if is_explicit(checkpoint):
        return _explicit(workload, checkpoint)
    layers = [(kind, layer.block and layer.safe_to_recompute) for kind, layer in enumerate(workload.layers) for _ in range(layer.repeats)]
    result: list[Segment] = []
    for recomputable, run in groupby(enumerate(layers), key=lambda item: item[1][1]):
        members = list(run)
        length = checkpoint_segment(checkpoint, len(members)) if recomputable else 0
        for start in range(0, len(members), length or 1):
            part = members[start : start + (length or 1)]
            result.append(Segment(tuple(i for i, _ in part), tuple(kind for _, (kind, _) in part), recomputed=length > 0))
    return tuple(result)


def _explicit(workload: Workload, checkpoint: str) -> tuple[Segment, ...]:
    layers = [(kind, layer) for kind, layer in enumerate(workload.layers) for _ in range(layer.repeats)]
    blocks = [i for i, (_, layer) in enumerate(layers) if layer.block]
    segment_at: dict[int, int] = {}
    for start, stop in parse_blocks(checkpoint):
        if stop > len(blocks):
            raise StrategyError(f"checkpoint={checkpoint}: {workload.name} has blocks 0 to {len(blocks) - 1}, no block {stop - 1}")
        if blocks[stop - 1] - blocks[start] != stop - 1 - start:
            raise StrategyError(f"checkpoint={checkpoint}: other layers stand between blocks {start} and {stop - 1} of {workload.name}")
        unsafe = next((b for b in range(start, stop) if not layers[blocks[b]][1].safe_to_recompute), None)
        if unsafe is not None:
            name = layers[blocks[unsafe]][1].name
            raise StrategyError(f"checkpoint={checkpoint}: block {unsafe} ({name}) must not run twice (batch statistics); leave it out")
        segment_at[blocks[start]] = stop - start
    result: list[Segment] = []
    at = 0
    while at < len(layers):
        length = segment_at.get(at, 1)
        kinds = tuple(kind for kind, _ in layers[at : at + length])
        result.append(Segment(tuple(range(at, at + length)), kinds, recomputed=at in segment_at))
        at += length
    return tuple(result)
