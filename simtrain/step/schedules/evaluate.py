"""What follows from a plan: activations in flight, and how long it takes when nothing else contends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray
from simtrain.step.schedules.language import Action
from simtrain.step.schedules.schedule_plan import SchedulePlan


@dataclass(frozen=True, slots=True, eq=False)
class InFlight:
    """Pairs of chunk and micro-batch whose saved tensors a rank holds, in the order of its instructions.

    Attributes:
        forward: For each rank, the most that have run forward and not yet backward (or input gradient).
        kept: For each rank, the most between input gradient and weight gradient.
        total: For each rank, the most of both at once.
        forward_at_peak: For each rank and chunk, those of the first kind when `total` is first reached,
        kept_at_peak: and of the second.
    """

    forward: IntArray
    kept: IntArray
    total: IntArray
    forward_at_peak: IntArray
    kept_at_peak: IntArray


def in_flight(plan: SchedulePlan) -> InFlight:
    """Counts the activations that a plan holds at its peaks.

    What a backward instruction frees counts until it has ended.

    Args:
        plan: A schedule laid out.
    """
    shape = (plan.stages, plan.chunks)
    forward, kept, total = (np.zeros(plan.stages, dtype=np.int64) for _ in range(3))
    forward_at_peak, kept_at_peak = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for rank in range(plan.stages):
        mine = plan.of_rank(rank)
        action, one_hot = plan.action[mine, None], plan.chunk[mine, None] == np.arange(plan.chunks)
        running = np.cumsum(_change(action, Action.FORWARD, (Action.BACKWARD, Action.INPUT_GRADIENT)) * one_hot, axis=0)
        waiting = np.cumsum(_change(action, Action.INPUT_GRADIENT, (Action.WEIGHT_GRADIENT,)) * one_hot, axis=0)
        forward[rank], kept[rank] = running.sum(axis=1).max(), waiting.sum(axis=1).max()
        peak = int(np.argmax((running + waiting).sum(axis=1)))
        forward_at_peak[rank], kept_at_peak[rank] = running[peak], waiting[peak]
        total[rank] = forward_at_peak[rank].sum() + kept_at_peak[rank].sum()
    return InFlight(forward, kept, total, forward_at_peak, kept_at_peak)


def _change(action: IntArray, begins: Action, ends: tuple[Action, ...]) -> IntArray:
    change: IntArray = (action == begins).astype(np.int64) - np.isin(action, ends)
    return change


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """When each instruction of a plan runs.

    Attributes:
        start_s: Start of each.
        end_s: End of each.
    """

    start_s: FloatArray
    end_s: FloatArray


def timeline(
    plan: SchedulePlan,
    forward_s: ArrayLike,
    input_gradient_s: ArrayLike,
    weight_gradient_s: ArrayLike,
    transfer_s: float = 0.0,
    ready_s: ArrayLike = 0.0,
) -> Timeline:
    """Runs a plan once: every instruction starts as soon as its rank is free and what it reads has arrived.

    Args:
        plan: A schedule laid out.
        forward_s: Forward time of a chunk: one for all, or one for each position of the model.
        input_gradient_s: Time of its input gradient.
        weight_gradient_s: Time of its weight gradient; a backward pass in one piece takes the sum.
        transfer_s: From the end of an instruction until its result is on another rank; transfers occupy nobody.
        ready_s: When each rank is free (one for all, or one for each).
    """
    forward, first, second = (
        np.broadcast_to(np.asarray(x, dtype=float), plan.positions) for x in (forward_s, input_gradient_s, weight_gradient_s)
    )
    by_action = np.stack((forward, first + second, first, second))
    duration = by_action[plan.action, plan.position].tolist()
    gate_pointer, gate = plan.gates
    crossing = np.repeat(plan.rank, np.diff(gate_pointer)) != plan.rank[gate]
    lag = (crossing * transfer_s).tolist()
    begin = np.broadcast_to(np.asarray(ready_s, dtype=float), plan.stages)[plan.rank].tolist()
    pointer, predecessor, before = gate_pointer.tolist(), gate.tolist(), plan.before.tolist()
    start, end = [0.0] * len(plan), [0.0] * len(plan)
    for i, earliest in enumerate(begin):
        at = end[before[i]] if before[i] >= 0 else earliest
        for j in range(pointer[i], pointer[i + 1]):
            arrival = end[predecessor[j]] + lag[j]
            at = arrival if arrival > at else at
        start[i], end[i] = at, at + duration[i]
    return Timeline(np.array(start), np.array(end))


def makespan(
    plan: SchedulePlan, forward_s: ArrayLike, input_gradient_s: ArrayLike, weight_gradient_s: ArrayLike, transfer_s: float = 0.0
) -> float:
    """Time from the first start to the last end of a step that all ranks begin together; see `timeline` for the arguments."""
    return float(timeline(plan, forward_s, input_gradient_s, weight_gradient_s, transfer_s).end_s.max())


def period(
    plan: SchedulePlan,
    forward_s: ArrayLike,
    input_gradient_s: ArrayLike,
    weight_gradient_s: ArrayLike,
    transfer_s: float = 0.0,
    steps: int = 8,
) -> float:
    """Time from step to step if each rank begins the next as soon as it has ended its own, without waiting for the others.

    This is what zero-bubble schedules aim at; it needs an optimizer that no rank has to agree on (Qi et al. 2023, section 4).

    Args:
        plan: A schedule laid out.
        forward_s: See `timeline`.
        input_gradient_s: See `timeline`.
        weight_gradient_s: See `timeline`.
        transfer_s: See `timeline`.
        steps: Steps run; the last two give the period.
    """
    last = plan.rank_order[plan.rank_pointer[1:] - 1]
    free: FloatArray = np.zeros(plan.stages)
    before = free
    for _ in range(steps):
        before, free = free, timeline(plan, forward_s, input_gradient_s, weight_gradient_s, transfer_s, free).end_s[last]
    return float((free - before).max())
