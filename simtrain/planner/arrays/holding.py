"""When a pipeline stage may be fullest: what it holds before each instruction, as counts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.step.schedules import Action, SchedulePlan

GROUPS = 3
"""Chunks that hold an end of the model, others, and others with fewer blocks."""

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
    rows = np.array(sorted(found))
    # nothing with as much of everything at the same kind of moment
    above = np.all(rows[None] >= rows[:, None], axis=2) & np.any(rows[None] > rows[:, None], axis=2)
    return np.asarray(rows[~above.any(axis=1)])
