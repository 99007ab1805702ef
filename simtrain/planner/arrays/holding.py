"""When a pipeline stage may be fullest: what it holds before each instruction, as counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray
from simtrain.step.schedules import Action, SchedulePlan

GROUPS = 3
"""Chunks that hold an end of the model, others, and others with fewer blocks."""

FEW_ROUNDS = 2
"""Micro-batches per stage from which every stage but the last runs forward passes between backward passes."""

FEATURES = 5 * GROUPS
"""Columns of `moments`: what a forward pass leaves, by group; what gradients take, by group; and for each group the fullest moments of a
forward pass, of a backward pass that adds to gradients and of one that makes them."""


def groups(plan: SchedulePlan, stage: int, blocks: tuple[int, ...]) -> list[int]:
    """The group of each chunk of a stage.

    Args:
        plan: The schedule.
        stage: Which.
        blocks: Of every position of the model.
    """
    held = plan.placement[stage]
    ends = (0, plan.positions - 1)
    most = max((blocks[p] for p in held if p not in ends), default=0)
    return [0 if p in ends else 1 if blocks[p] == most else 2 for p in held]


@lru_cache(maxsize=2048)
def moments(plan: SchedulePlan, stage: int, blocks: tuple[int, ...]) -> FloatArray:
    """The instructions of a stage before which it holds most, as counts of what it holds; shape (moments, `FEATURES`).

    Args:
        plan: The schedule.
        stage: Which.
        blocks: Of every position of the model.
    """
    of_chunk = groups(plan, stage, blocks)
    own = plan.of_rank(stage)
    held = np.zeros(2 * GROUPS)
    begun: set[int] = set()
    found: set[tuple[float, ...]] = set()
    for action, chunk in zip(plan.action[own].tolist(), plan.chunk[own].tolist(), strict=True):
        group = of_chunk[chunk]
        kind = 0 if action == Action.FORWARD else 1 if chunk in begun else 2
        row = [*held, *(0.0,) * (3 * GROUPS)]
        row[2 * GROUPS + 3 * group + kind] = 1.0
        found.add(tuple(row))
        if action == Action.FORWARD:
            held[group] += 1
        else:
            held[group] -= 1
            if chunk not in begun:
                begun.add(chunk)
                held[GROUPS + group] += 1
    return _most(np.array(sorted(found)))


def _most(rows: FloatArray) -> FloatArray:
    """Moments without those for which another of the same kind has as much of everything."""
    above = np.all(rows[None] >= rows[:, None], axis=2) & np.any(rows[None] > rows[:, None], axis=2)
    return np.asarray(rows[~above.any(axis=1)])


@lru_cache(maxsize=2048)
def moments_between(plan: SchedulePlan, stage: int, blocks: tuple[int, ...]) -> FloatArray:
    """`moments` of a stage, and of those behind it which hold the same.

    Where a step has few micro-batches, a stage has run all its forward passes before the first gradient is there, and one behind it that
    has not holds more.

    Args:
        plan: The schedule.
        stage: Which.
        blocks: Of every position of the model.
    """
    few = plan.micro_batches < FEW_ROUNDS * plan.stages and 0 < stage < plan.stages - 1
    held = [blocks[p] for p in plan.placement[stage]]
    others = [s for s in range(stage + 1, plan.stages - 1) if few and [blocks[p] for p in plan.placement[s]] == held]
    if not others:
        return moments(plan, stage, blocks)
    return _most(np.unique(np.concatenate([moments(plan, s, blocks) for s in (stage, *others)]), axis=0))


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Chunks of a stage, as what they hold is looked up.

    Attributes:
        stage: Which.
        groups: Those that it has.
        roles: Of each group (`layers.ROLES`).
        lengths: Of each group, the index of its number of blocks.
        columns: Which of the columns of `moments` they use: five of each group.
        gradients: Counts of these columns while the stage updates: all its gradients.
    """

    stage: int
    groups: tuple[int, ...]
    roles: tuple[int, ...]
    lengths: tuple[int, ...]
    columns: IntArray
    gradients: FloatArray

    @classmethod
    def of(cls, order: SchedulePlan, stage: int, blocks: tuple[int, ...], lengths: tuple[int, ...]) -> Placed:
        """The chunks of a stage.

        Args:
            order: The schedule.
            stage: Which.
            blocks: Of every position of the model.
            lengths: All numbers of blocks that there are.
        """
        of_chunk, held, last = groups(order, stage, blocks), order.placement[stage], order.positions - 1
        own = tuple(sorted(set(of_chunk)))
        at = [held[of_chunk.index(g)] for g in own]
        columns = [[g, GROUPS + g, *(2 * GROUPS + 3 * g + k for k in range(3))] for g in own]
        gradients = [[0.0, float(of_chunk.count(g)), 0.0, 0.0, 0.0] for g in own]
        return cls(
            stage,
            own,
            tuple(3 if last == 0 else 1 if g else 0 if p == 0 else 2 for g, p in zip(own, at, strict=True)),
            tuple(lengths.index(blocks[p]) for p in at),
            np.array(columns).ravel(),
            np.array(gradients).ravel(),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What the stages of many strategies hold, by kind.

    Attributes:
        peaks: Fullest moments of instructions (samples, precision, checkpoint, split, ZeRO 3 or not, role, pass, length, kind).
        nets: What they leave behind.
        fixed: What each of the stages looked at holds all the time (profiles, stages, kinds).
        update: What the update takes beside it.
    """

    peaks: FloatArray
    nets: FloatArray
    fixed: FloatArray
    update: FloatArray

    def features(self, placed: Placed, at: tuple[IntArray, ...], always: np.ndarray) -> FloatArray:
        """What `Placed.columns` count; shape (strategies, columns, kinds).

        Args:
            placed: The stage.
            at: For each strategy, the first five indices of `peaks`.
            always: For each strategy, whether gradients have a place from the start.
        """
        found = np.zeros((len(always), 5 * len(placed.groups), self.peaks.shape[-1]))
        for i, (role, length) in enumerate(zip(placed.roles, placed.lengths, strict=True)):
            nets, peaks = self.nets[..., role, :, length, :][at], self.peaks[..., role, :, length, :][at]
            made = np.where(always[:, None], 0.0, nets[:, 0] + nets[:, 2])
            makes = np.where(always[:, None], peaks[:, 1], peaks[:, 2])
            for j, own in enumerate((nets[:, 0], made, peaks[:, 0], peaks[:, 1], makes)):
                found[:, 5 * i + j] = own
        return found

    def fullest(
        self,
        stages: Sequence[Placed],
        orders: Mapping[int, SchedulePlan],
        blocks: tuple[int, ...],
        profile: IntArray,
        count: IntArray,
        at: tuple[IntArray, ...],
        always: np.ndarray,
    ) -> FloatArray:
        """What the allocator of the fullest stage holds at its fullest moment, by kind; shape (rows, kinds).

        Args:
            stages: Those looked at.
            orders: The schedule with so many micro-batches.
            blocks: Of every position of the model.
            profile: Of each row.
            count: Micro-batches of each row.
            at: For each profile, the first five indices of `peaks`.
            always: For each profile, whether gradients have a place from the start.
        """
        numbers = alike(count)
        level, chosen = np.full(len(profile), -np.inf), np.zeros(len(profile), dtype=np.int64)
        found: list[tuple[FloatArray, FloatArray, np.ndarray]] = []
        used, back = np.unique(profile, return_inverse=True)
        back = back.ravel()
        listed = moments if always.all() else moments_between  # with gradients there from the start, the first stages are fullest
        for i, placed in enumerate(stages):
            features = self.features(placed, tuple(a[used] for a in at), always[used])
            total = features.sum(axis=2)
            coefficients = np.zeros((len(profile), total.shape[1]))
            fullest = np.zeros(len(profile))
            for number, rows in numbers:
                counts = listed(orders[number], placed.stage, blocks)[:, placed.columns]
                reached = total[back[rows]] @ counts.T
                coefficients[rows] = counts[reached.argmax(axis=1)]
                fullest[rows] = reached.max(axis=1)
            updating = (total @ placed.gradients + self.update[used, i].sum(axis=1))[back]
            later = updating > fullest
            coefficients[later] = placed.gradients
            whole = np.maximum(fullest, updating) + self.fixed[used, i].sum(axis=1)[back]
            more = whole > level
            level[more], chosen[more] = whole[more], i
            found.append((features, coefficients, later))
        kinds = self.fixed[profile, chosen]
        for i, (features, coefficients, later) in enumerate(found):
            own = np.flatnonzero(chosen == i)
            kinds[own] += np.where(later[own, None], self.update[profile[own], i], 0.0)
            kinds[own] += np.einsum("nf,nfk->nk", coefficients[own], features[back[own]])
        return kinds


def alike(values: IntArray) -> list[tuple[int, IntArray]]:
    """Distinct values, each with where it stands."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    cuts = np.flatnonzero(np.diff(ordered)) + 1
    return [(int(values[rows[0]]), rows) for rows in np.split(order, cuts) if len(rows)]
