"""Critical paths of pipeline schedules, as counts of what lies on them.

The step time of a pipeline is the longest path through its instructions. Every path is a sum of a few quantities (`Part`) with whole
numbers before them, so the step time of a strategy is `max over paths of (counts . quantities)`. Which paths can be critical depends on
the schedule, the stages and the micro-batches alone: they are found by walking the instructions for some sets of quantities at once, and
each walk adds the path that was critical for it. As every path is a lower bound, a set of paths never gives too long a step, and it gives
the exact one wherever it holds the critical path.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray
from simtrain.step.schedules import Action, SchedulePlan

FEW_ROUNDS = 2
"""Micro-batches per stage of the shorter of two steps from which longer ones are projected."""


class Part(IntEnum):
    """What a path is made of: passes of a block, of what stands before the blocks and behind them; sends; both ends of a step."""

    FORWARD = 0
    FORWARD_BEFORE = 1
    FORWARD_BEHIND = 2
    BACKWARD = 3
    BACKWARD_BEFORE = 4
    BACKWARD_BEHIND = 5
    FIRST = 6
    """What the backward pass of a block takes more in the first micro-batch; the same of what stands before and behind follows."""
    FIRST_BEFORE = 7
    FIRST_BEHIND = 8
    LAST = 9
    """The same in the last micro-batch."""
    LAST_BEFORE = 10
    LAST_BEHIND = 11
    INPUT = 12
    """Half of a backward pass that makes the gradient of the input."""
    INPUT_BEFORE = 13
    INPUT_BEHIND = 14
    WEIGHT = 15
    WEIGHT_BEFORE = 16
    WEIGHT_BEHIND = 17
    SEND_INSIDE = 18
    """To a stage on the same node."""
    SEND_ACROSS = 19
    TAIL_FIRST = 20
    """What the first stage takes from its last pass until its gradients are there."""
    TAIL_MIDDLE = 21
    TAIL_LAST = 22
    START_FIRST = 23
    """What the first stage takes from when all gradients are there until it can begin with the next step."""
    START_MIDDLE = 24
    START_LAST = 25


WIDTH = len(Part)
_OF_ACTION = {Action.FORWARD: 0, Action.BACKWARD: 3, Action.INPUT_GRADIENT: 12, Action.WEIGHT_GRADIENT: 15}


@dataclass(frozen=True, eq=False)
class Walk:
    """The instructions of a schedule as nodes of a graph, level by level.

    Attributes:
        plan: The schedule.
        blocks: How many blocks each position of the model has.
        per_node: Stages on one node (1 where a stage fills a node or several).
        blocking: Whether a stage waits until what it sends has left.
        more: Counts of further quantities behind every `Part`: of each instruction, and of the way to it from the one before on its stage.
    """

    plan: SchedulePlan
    blocks: tuple[int, ...]
    per_node: int
    blocking: bool
    more: tuple[FloatArray, FloatArray] | None = None

    @property
    def _width(self) -> int:
        return self.more[0].shape[1] if self.more else WIDTH

    @cached_property
    def _nodes(self) -> tuple[FloatArray, IntArray, list[IntArray]]:
        """Counts of parts of each node, what each waits for (up to three, the last node for none), and nodes by level.

        Instructions come first, then what they send, then the beginning of each stage, then one that takes no time.
        """
        plan, count, stages = self.plan, len(self.plan), self.plan.stages
        none = 2 * count + stages
        pointer, predecessor = plan.gates
        owner = np.repeat(np.arange(count), np.diff(pointer))
        across = plan.rank[owner] != plan.rank[predecessor]
        target, source = owner[across], predecessor[across]
        waits = np.full((none + 1, 3), none, dtype=np.int64)
        waits[:count, 0] = np.where(plan.before >= 0, plan.before, 2 * count + plan.rank)
        waits[target, 1] = count + source
        waits[count + source, 0] = source
        sends = np.sort(source)
        way = 2 * plan.rank[sends] + (plan.action[sends] == Action.FORWARD)
        for one in np.unique(way).tolist():
            line = sends[way == one]
            waits[count + line[1:], 1] = count + line[:-1]
        if self.blocking:
            held = plan.before >= 0
            sent = np.zeros(count, dtype=bool)
            sent[source] = True
            held &= sent[np.maximum(plan.before, 0)]
            waits[:count, 2][held] = count + plan.before[held]
        level = _levels(plan.before, source, target)
        sent_level = np.full(count, -1, dtype=np.int64)
        sent_level[source] = 2 * level[source] + 1
        every = np.concatenate([2 * level, sent_level])
        order = np.argsort(every, kind="stable")
        order = order[every[order] >= 0]
        cuts = np.flatnonzero(np.diff(every[order])) + 1
        return self._counts(source, target, none), waits, np.split(order, cuts)

    def _counts(self, source: IntArray, target: IntArray, none: int) -> FloatArray:
        plan, count = self.plan, len(self.plan)
        counts = np.zeros((none + 1, self._width))
        if self.more:
            counts[:count] = self.more[0]
        base = np.array([_OF_ACTION[Action(a)] for a in range(len(Action))])[plan.action]
        held = np.array(self.blocks)[plan.position]
        rows = np.arange(count)
        first, last = plan.position == 0, plan.position == plan.positions - 1
        counts[rows, base] = held
        counts[rows[first], base[first] + 1] = 1
        counts[rows[last], base[last] + 2] = 1
        makes = np.isin(plan.action, (Action.BACKWARD, Action.WEIGHT_GRADIENT))
        for cell in np.unique(plan.position).tolist():
            own = rows[makes & (plan.position == cell)]
            own = own[np.argsort(plan.index[own])]
            for i, part in ((own[0], Part.FIRST), (own[-1], Part.LAST)):
                counts[i, part] += held[i]
                counts[i, part + 1] += first[i]
                counts[i, part + 2] += last[i]
        away = plan.rank[source] // self.per_node != plan.rank[target] // self.per_node
        counts[count + source, np.where(away, Part.SEND_ACROSS, Part.SEND_INSIDE)] = 1
        stage = np.arange(plan.stages)
        counts[2 * count + stage, Part.START_FIRST + _class(stage, plan.stages)] = 1
        return counts

    def critical(self, quantities: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Step times for some sets of quantities (sets, parts), and the counts of the path that is critical for each."""
        counts, waits, levels = self._nodes
        plan, count = self.plan, len(self.plan)
        takes = counts @ quantities.T
        behind = self.more[1] @ quantities.T if self.more else None
        ends = np.zeros_like(takes)
        stage = np.arange(plan.stages)
        begins = 2 * count + stage
        ends[begins] = takes[begins]
        chosen = np.zeros(takes.shape, dtype=np.int8)
        for nodes in levels:
            options = ends[waits[nodes]]
            if behind is not None and nodes[0] < count:
                options[:, 0] += behind[nodes]
            chosen[nodes] = options.argmax(axis=1)
            ends[nodes] = options.max(axis=1) + takes[nodes]
        tails = np.zeros((plan.stages, self._width))
        tails[stage, Part.TAIL_FIRST + _class(stage, plan.stages)] = 1
        final = plan.rank_order[plan.rank_pointer[1:] - 1]
        whole = ends[final] + tails @ quantities.T
        latest = whole.argmax(axis=0)
        paths = tails[latest]
        for k, end in enumerate(final[latest].tolist()):
            path = [end]
            while path[-1] < 2 * count:
                path.append(int(waits[path[-1], chosen[path[-1], k]]))
            paths[k] += counts[path].sum(axis=0)
            if self.more:
                paths[k] += self.more[1][[i for i in path if i < count and chosen[i, k] == 0]].sum(axis=0)
        return whole.max(axis=0), paths


def _class(stage: IntArray, stages: int) -> IntArray:
    """0 for the first stage, 2 for the last, 1 for those between."""
    return np.where(stage == 0, 0, np.where(stage == stages - 1, 2, 1))


def _levels(before: IntArray, source: IntArray, target: IntArray) -> IntArray:
    """Levels at which instructions can run if each takes one; they are numbered so that whatever one waits for comes first."""
    level = [0] * len(before)
    waits = [-1] * len(before)
    for i, j in zip(target.tolist(), source.tolist(), strict=True):
        waits[i] = j
    for i, j in enumerate(before.tolist()):
        other = waits[i]
        level[i] = 1 + max(level[j] if j >= 0 else 0, level[other] if other >= 0 else 0)
    return np.array(level, dtype=np.int64)


@lru_cache(maxsize=64)
def walk(plan: SchedulePlan, blocks: tuple[int, ...], per_node: int, blocking: bool) -> Walk:
    """The graph of a schedule; plans are shared, so graphs are too."""
    return Walk(plan, blocks, per_node, blocking)


SAMPLES = 24
"""Sets of quantities that are walked at once."""


def find_paths(graph: Walk, quantities: FloatArray) -> FloatArray:
    """Counts of critical paths, shape (paths, parts): those of the given sets of quantities (sets, parts) that differ most."""
    return np.unique(graph.critical(quantities[_apart(quantities, SAMPLES)])[1], axis=0)


def _apart(quantities: FloatArray, count: int) -> list[int]:
    """Rows that are far from one another in what they are made of, each the farthest from those before it."""
    shares = quantities / quantities.sum(axis=1, keepdims=True)
    picked = [0]
    distance = np.abs(shares - shares[0]).sum(axis=1)
    while len(picked) < count and distance.max() > 0:
        picked.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(shares - shares[picked[-1]]).sum(axis=1))
    return picked


def projected_micro_batches(stages: int, micro_batches: int) -> tuple[int, int]:
    """Numbers of micro-batches of two shorter steps from which a step is projected; both are its own where it is short."""
    if micro_batches <= (FEW_ROUNDS + 2) * stages:
        return micro_batches, micro_batches
    rest = micro_batches % stages
    return FEW_ROUNDS * stages + rest, (FEW_ROUNDS + 1) * stages + rest


def both_passes(parts: FloatArray) -> FloatArray:
    """Both passes of a block, of what stands before the blocks and behind them; shape (candidates, 3)."""
    return parts[:, Part.FORWARD : Part.FORWARD + 3] + parts[:, Part.BACKWARD : Part.BACKWARD + 3]


def paced(quantities: FloatArray, host: FloatArray, own: FloatArray, issued: FloatArray, counts: IntArray) -> FloatArray:
    """Quantities of profiles with the passes of a stage and of a block as long as their hosts take.

    Args:
        quantities: On the device.
        host: On the host.
        own: Passes of the first stage, one between and the last, on the device.
        issued: The same on the host.
        counts: Blocks of each stage.
    """
    passes = both_passes(quantities)
    stage = np.maximum(own, issued)
    block = np.maximum(passes[:, 0], both_passes(host)[:, 0])
    ends = np.stack([stage[:, 0] - counts[0] * block, stage[:, 2] - counts[-1] * block], axis=1)
    scale = np.stack([block / passes[:, 0], *(ends / passes[:, 1:]).T], axis=1)
    found = quantities.copy()
    found[:, : Part.FIRST] *= np.tile(scale, 2)
    return found
