"""Full sharding (`simtrain.step.fully_sharded`) of many strategies at once.

Replicas of one stage are walked in full: gathers, passes and scatters in the order of their queues, as `simtrain.step.estimate_chunks` does
for one strategy. Strategies with the same layers differ in what passes and messages take, not in their order, so that one walk on vectors
serves them all. Pipelines are in `simtrain.planner.arrays.gathers`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray

REST, BLOCK = 0, 1
"""What a pass needs gathered: what is no block, or a block."""

BESIDE = 6
"""Messages that may run beside a pass: the queue is not entered further ahead."""

SETTLED = 3
"""Micro-batches after which every further one takes as long as the last."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Passes of a micro-batch in their order, blocks once.

    Attributes:
        forward: For each forward pass, whether it is one of the block.
        backward: The same of the passes that go back; a block that is recomputed has two.
    """

    forward: tuple[bool, ...]
    backward: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Visit:
    """One pass: the column of its time, what it needs, whether that is gathered anew, whether its gradients are scattered."""

    column: int
    unit: int
    anew: bool
    scatters: bool


@lru_cache(maxsize=256)
def visits(sequence: Sequence, blocks: int, micro_batches: int) -> tuple[Visit, ...]:
    """What passes need, all micro-batches one after the other.

    Columns are those of forward passes, then of backward passes that add to gradients, then of those that make them.
    """
    found: list[Visit] = []
    wide = len(sequence.forward)
    rest = False
    for m in range(micro_batches):
        for flags, start in ((sequence.forward, 0), (sequence.backward, wide + (m == 0) * len(sequence.backward))):
            own = [i for i, block in enumerate(flags) if block]
            back = start > 0
            for i in range(own[0]):
                found.append(Visit(start + i, REST, anew=not rest, scatters=False))
                rest = True
            for _ in range(blocks):
                found += [Visit(start + i, BLOCK, anew=i == own[0], scatters=back and i == own[-1]) for i in own]
            for i in range(own[-1] + 1, len(flags)):
                found.append(Visit(start + i, REST, anew=not rest, scatters=back and i == len(flags) - 1))
                rest = True
        rest = False
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """Strategies whose replicas shard everything over one stage.

    Attributes:
        sequence: Their passes.
        blocks: How many blocks they have.
        passes_s: What the passes take (strategies, columns of `visits`).
        gather_s: Gathering what is no block, and a block; the same for all of them.
        scatter_s: Scattering their gradients.
        share: Of the multiprocessors that a message takes from a pass beside it.
        overlaps: Whether passes go on while gradients are scattered.
    """

    sequence: Sequence
    blocks: int
    passes_s: FloatArray
    gather_s: FloatArray
    scatter_s: FloatArray
    share: float
    overlaps: bool

    def step_s(self, rows: IntArray, accumulation: IntArray) -> FloatArray:
        """From the first gather until the last gradients are there, for some of the strategies with so many micro-batches."""
        found = np.zeros(len(rows))
        for count in range(1, SETTLED):
            chosen = accumulation == count
            if chosen.any():
                found[chosen] = self._walk(count)[rows[chosen]]
        many = accumulation >= SETTLED
        if many.any():
            last = self._walk(SETTLED)
            more = last - self._walk(SETTLED - 1)
            found[many] = last[rows[many]] + (accumulation[many] - SETTLED) * more[rows[many]]
        return found

    def _walk(self, micro_batches: int) -> FloatArray:
        listed = visits(self.sequence, self.blocks, micro_batches)
        count = len(self.passes_s)
        at = wire = np.zeros(count)
        ends: list[FloatArray] = []
        ready: list[FloatArray] = []
        moving: deque[tuple[FloatArray, FloatArray]] = deque(maxlen=BESIDE)
        for n, visit in enumerate(listed):
            for ahead in range(len(ready), min(n + 2, len(listed))):
                if listed[ahead].anew:  # takes the room of what was needed two passes before
                    start = np.maximum(wire, ends[ahead - 2]) if ahead > 1 else wire
                    wire = start + self.gather_s[listed[ahead].unit]
                    moving.append((start, wire))
                ready.append(wire if listed[ahead].anew else at)
            start = np.maximum(at, ready[n])
            at = start + self.passes_s[:, visit.column]
            beside = sum((np.maximum(np.minimum(at, b) - np.maximum(start, a), 0.0) for a, b in moving), np.zeros(count))
            at = at + self.share * beside
            ends.append(at)
            if visit.scatters:
                start = np.maximum(wire, at)
                wire = start + self.scatter_s[visit.unit]
                moving.append((start, wire))
                at = at if self.overlaps else wire
        return np.asarray(np.maximum(at, wire))
