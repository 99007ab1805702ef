"""What a plan repeats: few distinct instructions, and few distinct routes over which results cross to other ranks.

Both follow from the plan alone, so they are found once for each plan, which is kept as well (`schedule_plan.plan`).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from simtrain.core.program import IntArray
from simtrain.step.schedules.language import Action
from simtrain.step.schedules.schedule_plan import SchedulePlan


class Kind(NamedTuple):
    """An instruction, whatever the micro-batch.

    Attributes:
        rank: Of the pipeline.
        chunk: Index of the model chunk on this rank.
        action: What is done.
        adding: Whether gradients of an earlier micro-batch are there.
        last: Whether gradients of the chunk are complete after it.
    """

    rank: int
    chunk: int
    action: Action
    adding: bool
    last: bool


class Route(NamedTuple):
    """Where results of a chunk go.

    Attributes:
        rank: That holds the chunk.
        chunk: Index of the chunk on this rank.
        target: Rank that waits for them.
        forward: Whether they are outputs; gradients otherwise.
    """

    rank: int
    chunk: int
    target: int
    forward: bool


class Crossings(NamedTuple):
    """What crosses to other ranks, one entry for each that waits.

    Attributes:
        routes: Distinct ones.
        route: Which of them.
        source: Instruction that makes it.
        target: Instruction that waits for it.
        after: Next instruction of the source's rank (-1 for none).
    """

    routes: tuple[Route, ...]
    route: IntArray
    source: IntArray
    target: IntArray
    after: IntArray


@lru_cache(maxsize=16)
def kinds(plan: SchedulePlan) -> tuple[tuple[Kind, ...], IntArray]:
    """Distinct instructions of a plan, and which of them each of its instructions is."""
    gradients = (plan.action == Action.BACKWARD) | (plan.action == Action.WEIGHT_GRADIENT)
    cell = plan.rank * plan.chunks + plan.chunk
    made = plan.rank_order[gradients[plan.rank_order]]
    ends = np.zeros((2, plan.stages * plan.chunks), dtype=np.int64)
    ends[0, cell[made[::-1]]], ends[1, cell[made]] = plan.micro_batch[made[::-1]], plan.micro_batch[made]
    backward = plan.action != Action.FORWARD
    adding, last = backward & (plan.micro_batch != ends[0, cell]), backward & (plan.micro_batch == ends[1, cell])
    rows, which = _distinct((plan.rank, plan.chunk, plan.action, adding, last), (plan.stages, plan.chunks, len(Action), 2, 2))
    return tuple(Kind(rank, chunk, Action(action), bool(adds), bool(ends)) for rank, chunk, action, adds, ends in rows), which


@lru_cache(maxsize=16)
def crossings(plan: SchedulePlan) -> Crossings:
    """What crosses to other ranks in a plan, sorted by source."""
    pointer, predecessor = plan.gates
    target = np.repeat(np.arange(len(plan)), np.diff(pointer))
    across = plan.rank[target] != plan.rank[predecessor]
    target, source = target[across], predecessor[across]
    order = np.lexsort((target, source))
    target, source = target[order], source[order]
    columns = (plan.rank[source], plan.chunk[source], plan.rank[target], plan.action[source] == Action.FORWARD)
    rows, route = _distinct(columns, (plan.stages, plan.chunks, plan.stages, 2))
    after = np.full(len(plan), -1)
    after[plan.before[plan.before >= 0]] = np.flatnonzero(plan.before >= 0)
    routes = tuple(Route(rank, chunk, to, bool(ahead)) for rank, chunk, to, ahead in rows)
    return Crossings(routes, route, source, target, after[source])


def _distinct(columns: tuple[IntArray, ...], shape: tuple[int, ...]) -> tuple[list[list[int]], IntArray]:
    """Distinct rows of small numbers, in order, and which of them each row is."""
    key = np.ravel_multi_index(columns, shape)
    there = np.bincount(key, minlength=prod(shape)) > 0
    rows: list[list[int]] = np.stack(np.unravel_index(np.flatnonzero(there), shape), axis=1).tolist()
    return rows, (np.cumsum(there) - 1)[key]
