"""GPipe: all forward passes, then all backward passes (Huang et al. 2019, arXiv 1811.06965).

Even stages and free transfers leave every rank idle for (p - 1) / (m + p - 1) of the step; all m micro-batches are in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.step.schedules.language import Instruction, Placement, backward, forward, single_placement


@dataclass(frozen=True, slots=True)
class GPipe:
    """All forward passes, then all backward passes in the same order."""

    name: str = "gpipe"
    default_chunks: int = 1

    def placement(self, stages: int, chunks: int) -> Placement:
        """One chunk per rank, in order."""
        return single_placement(self.name, stages, chunks)

    def order(self, rank: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:  # noqa: ARG002
        """The same on every rank."""
        return [*map(forward, range(micro_batches)), *map(backward, range(micro_batches))]
