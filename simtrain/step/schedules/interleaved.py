"""Interleaved 1F1B: every rank holds several chunks, which divides the bubble by their number (Narayanan et al. 2021, arXiv 2104.04473).

The order and the length of the warm-up are those of Megatron-LM's `forward_backward_pipelining_with_interleaving`: micro-batches go in
groups of as many as there are stages, a group through all chunks before the next, and rank r runs 2 (p - r - 1) + (v - 1) p forward
chunks before its first backward chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.core.errors import StrategyError
from simtrain.step.schedules.language import Instruction, Placement, backward, forward, looped_placement, one_forward_one_backward


@dataclass(frozen=True, slots=True)
class Interleaved:
    """1F1B over chunks instead of stages."""

    name: str = "interleaved"
    default_chunks: int = 2

    def placement(self, stages: int, chunks: int) -> Placement:
        """The model runs around the ranks."""
        return looped_placement(stages, chunks)

    def order(self, rank: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:
        """Warm-up, steady state, cool-down over chunks.

        Raises:
            StrategyError: The micro-batches are no multiple of the stages.
        """
        if micro_batches % stages:
            above = -(-micro_batches // stages) * stages
            fix = f"{above - stages} or {above}" if above > stages else f"{above}"
            raise StrategyError(
                f"schedule {self.name!r} needs micro-batches (accumulation={micro_batches}) divisible by the stages (pipeline={stages}): "
                f"use accumulation={fix}, or schedule 'breadth-first'"
            )
        groups = range(0, micro_batches, stages)
        forwards = [forward(g + i, chunk) for g in groups for chunk in range(chunks) for i in range(stages)]
        backwards = [backward(g + i, chunk) for g in groups for chunk in reversed(range(chunks)) for i in range(stages)]
        return one_forward_one_backward(forwards, backwards, warm_up_chunks(rank, stages, chunks))


def warm_up_chunks(rank: int, stages: int, chunks: int) -> int:
    """Forward chunks that a rank runs before it alternates (Megatron-LM); 1F1B's own number where there is but one chunk per rank."""
    if chunks == 1:
        return stages - 1 - rank
    return 2 * (stages - 1 - rank) + (chunks - 1) * stages
