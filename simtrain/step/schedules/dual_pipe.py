"""DualPipe: micro-batches enter at both ends of the pipeline (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.2.1).

Rank r holds position r for the micro-batches that run down and position p - 1 - r for those that run up, so every position and its
parameters exist twice. The order of the phases follows the published implementation (deepseek-ai/DualPipe, `DualPipe.step`). What the
report draws as one overlapped cell stands here as a forward chunk that runs together with the backward chunk behind it; whether the two
take less than their sum is a question of costs, not of the order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from simtrain.core.errors import StrategyError
from simtrain.step.schedules.language import (
    Instruction,
    Placement,
    backward,
    forward,
    input_gradient,
    weight_gradient,
)


@dataclass(frozen=True, slots=True)
class DualPipe:
    """Two 1F1B pipelines in opposite directions on the same ranks, with a split backward pass at the ends."""

    name: str = "dualpipe"
    default_chunks: int = 2

    def placement(self, stages: int, chunks: int) -> Placement:
        """Chunk 0 of a rank stands where it runs down, chunk 1 where it runs up.

        Raises:
            StrategyError: The stages are odd, or the chunks are not two.
        """
        if stages % 2:
            raise StrategyError(
                f"schedule {self.name!r} needs an even number of stages, not pipeline={stages}: use {stages - 1} or {stages + 1}"
            )
        if chunks != 2:
            raise StrategyError(f"schedule {self.name!r} holds two chunks per rank, one of each direction, not {chunks}: leave chunks at 2")
        return tuple((rank, stages - 1 - rank) for rank in range(stages))

    def order(self, rank: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:  # noqa: ARG002
        """Eight phases; the ranks of the second half mirror those of the first.

        Raises:
            StrategyError: The micro-batches are odd or fewer than twice the stages.
        """
        if micro_batches % 2 or micro_batches < 2 * stages:
            fix = max(2 * stages, micro_batches + micro_batches % 2)
            raise StrategyError(
                f"schedule {self.name!r} needs an even number of micro-batches of at least twice the stages (pipeline={stages}), not "
                f"accumulation={micro_batches}: use accumulation={fix}"
            )
        half, depth = micro_batches // 2, min(rank, stages - 1 - rank)
        outer = stages // 2 - 1 - depth  # ranks between this one and the middle
        near = int(rank >= stages // 2)  # the chunk whose micro-batches enter at the nearer end
        work = _Work(near, half)
        for _ in range(2 * outer):
            work.forward(0)
        for _ in range(depth + 1):
            work.forward(0)
            work.forward(1)
        for _ in range(outer):
            work.backward(1, split=True)
            work.weight()
            work.forward(1)
        for i in range(half - stages + depth + 1):
            work.forward(0, with_next=i > 0 or outer > 0)  # the middle ranks hand their first one on at once
            work.backward(1)
            work.forward(1, with_next=True)
            work.backward(0)
        for _ in range(outer):
            work.backward(1)
            work.forward(1, with_next=True)
            work.backward(0)
        for i in range(2 * (depth + 1)):  # the second half of these leave their weight gradients for the end
            work.backward(1 - i % 2, split=i > depth)
        for _ in range(outer):
            work.weight()
            work.backward(0, split=True)
        for _ in range(depth + 1):
            work.weight()
        return work.done


@dataclass(slots=True)
class _Work:
    """What a rank has done so far, by direction (0 for the micro-batches that enter at the nearer end)."""

    near: int
    half: int
    done: list[Instruction] = field(default_factory=list)
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    backwards: list[int] = field(default_factory=lambda: [0, 0])
    waiting: deque[Instruction] = field(default_factory=deque)

    def _next(self, count: list[int], direction: int) -> tuple[int, int]:
        chunk = direction ^ self.near
        count[direction] += 1
        return chunk * self.half + count[direction] - 1, chunk

    def forward(self, direction: int, *, with_next: bool = False) -> None:
        self.done.append(forward(*self._next(self.forwards, direction), with_next=with_next))

    def backward(self, direction: int, *, split: bool = False) -> None:
        micro_batch, chunk = self._next(self.backwards, direction)
        self.done.append(input_gradient(micro_batch, chunk) if split else backward(micro_batch, chunk))
        if split:
            self.waiting.append(weight_gradient(micro_batch, chunk))

    def weight(self) -> None:
        self.done.append(self.waiting.popleft())
