"""Breadth-first: all micro-batches through one chunk before the next chunk (Lamy-Poirier 2023, arXiv 2211.05953).

The bubble is that of the interleaved schedule for any number of micro-batches from the number of stages up. All micro-batches of all
chunks are in flight, but the gradients of a chunk are complete early and its weights are needed once, which suits sharded data
parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.step.schedules.language import Instruction, Placement, backward, forward, looped_placement


@dataclass(frozen=True, slots=True)
class BreadthFirst:
    """Forward chunk by chunk, backward chunk by chunk."""

    name: str = "breadth-first"
    default_chunks: int = 2

    def placement(self, stages: int, chunks: int) -> Placement:
        """The model runs around the ranks."""
        return looped_placement(stages, chunks)

    def order(self, rank: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:  # noqa: ARG002
        """The same on every rank."""
        forwards = [forward(m, chunk) for chunk in range(chunks) for m in range(micro_batches)]
        return [*forwards, *(backward(m, chunk) for chunk in reversed(range(chunks)) for m in range(micro_batches))]
