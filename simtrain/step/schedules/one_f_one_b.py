"""1F1B: as soon as a micro-batch can go back it does (PipeDream-Flush, Narayanan et al. 2021, arXiv 2006.09503).

The bubble is that of GPipe; only min(m, p - rank) micro-batches are in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.step.schedules.language import Instruction, Placement, backward, forward, one_forward_one_backward, single_placement


@dataclass(frozen=True, slots=True)
class OneForwardOneBackward:
    """As many forward passes as there are stages behind, then one forward and one backward pass in turn."""

    name: str = "1f1b"
    default_chunks: int = 1

    def placement(self, stages: int, chunks: int) -> Placement:
        """One chunk per rank, in order."""
        return single_placement(self.name, stages, chunks)

    def order(self, rank: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:  # noqa: ARG002
        """Warm-up, steady state, cool-down."""
        forwards, backwards = [forward(m) for m in range(micro_batches)], [backward(m) for m in range(micro_batches)]
        return one_forward_one_backward(forwards, backwards, stages - 1 - rank)
