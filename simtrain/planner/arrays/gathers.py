"""What gathering parameters and scattering gradients adds to the instructions of a pipeline whose stages shard everything.

Each stage has one queue of messages, entered one pass ahead (`simtrain.step.fully_sharded`). What moves beside a pass therefore follows
from the order of passes alone: parameters of the pass after it, if they are not there yet, and gradients of the pass before it. A block's
pass takes a share longer beside messages, and no less than all of them take; around what is no block there are waits of their own. So each
instruction adds whole numbers of a few quantities, and critical paths count them like any others (`simtrain.planner.arrays.paths`).
Gradients of the last pass of an instruction move beside the first of the next only where that does not wait for another stage: they are
counted on the way from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import product

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.planner.arrays.paths import WIDTH, Part
from simtrain.step.schedules import Action, SchedulePlan


class Unit(IntEnum):
    """What is gathered for a pass or scattered after it."""

    NOTHING = 0
    BLOCK = 1
    BEFORE = 2
    """What stands before the blocks."""
    BEHIND = 3


class Wait(IntEnum):
    """Waits around what is no block."""

    BEGINS = 0
    """For the first block, behind what stands before it."""
    BEGINS_LEFT = 1
    """The same with gradients of a block in the queue."""
    BETWEEN = 2
    """The same and for what stands before the blocks, whose gradients have just been scattered."""
    ENDS = 3
    """For a block of the next instruction, behind the backward pass of what stands before the blocks."""
    TURNS = 4
    """For the last block, behind the backward pass of what stands behind it."""


BESIDE = tuple(product((False, True), Unit, Unit))
"""What moves beside a block's pass: whether that goes back, what is gathered, what is scattered."""

_COLUMN = {beside: WIDTH + i for i, beside in enumerate(BESIDE)}
_WAITS = WIDTH + len(BESIDE)

WIDE = _WAITS + len(Wait)
"""Quantities of a pipeline that shards everything: every `Part`, what lies beside passes, waits."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass of a stage, or several of equal blocks.

    Attributes:
        instruction: To which it belongs.
        unit: What it needs.
        back: Whether it goes back.
        gathered: What must be gathered for it.
        scattered: What is scattered after it.
        times: How many of them follow one another.
    """

    instruction: int
    unit: Unit
    back: bool
    gathered: Unit
    scattered: Unit
    times: int = 1


def _passes(plan: SchedulePlan, blocks: tuple[int, ...], stage: int) -> Iterator[_Pass]:
    """Passes of a stage in their order; see `simtrain.step.fully_sharded.stage_visits`."""
    rest: set[int] = set()
    latest: tuple[int, bool] | None = None
    own, final = plan.of_rank(stage), len(blocks) - 1
    for i, position, back in zip(own.tolist(), plan.position[own].tolist(), (plan.action[own] != Action.FORWARD).tolist(), strict=True):
        count = blocks[position]
        ends = ((Unit.BEFORE,) if position == 0 else (), (Unit.BEHIND,) if position == final else ())
        for unit in ends[back]:
            yield _Pass(i, unit, back, Unit.NOTHING if position in rest else unit, unit if back and unit is Unit.BEHIND else Unit.NOTHING)
            rest = rest - {position} if back else rest | {position}
            latest = None
        scattered = Unit.BLOCK if back else Unit.NOTHING
        anew = latest != (position, back) and not (count == 1 and latest is not None and latest[0] == position)
        yield _Pass(i, Unit.BLOCK, back, Unit.BLOCK if anew else Unit.NOTHING, scattered)
        if count > 1:
            yield _Pass(i, Unit.BLOCK, back, Unit.BLOCK, scattered, count - 1)
        latest = (position, not back)
        for unit in ends[not back]:
            yield _Pass(i, unit, back, Unit.NOTHING if position in rest else unit, unit if back else Unit.NOTHING)
            rest = rest - {position} if back else rest | {position}
            latest = None


def gather_counts(plan: SchedulePlan, blocks: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """What each instruction takes more, and the way to it from the one before; shapes (instructions, `WIDE`).

    Args:
        plan: The schedule.
        blocks: How many blocks each position of the model has.
    """
    within, between = np.zeros((len(plan), WIDE)), np.zeros((len(plan), WIDE))
    for stage in range(plan.stages):
        listed = list(_passes(plan, blocks, stage))
        for n, this in enumerate(listed):
            before, after = listed[n - 1] if n else None, listed[n + 1] if n + 1 < len(listed) else None
            if this.unit is Unit.BLOCK:
                _beside(within, between, this, before, after)
            else:
                _around(within, between, this, before, after)
    return within, between


def _beside(within: FloatArray, between: FloatArray, this: _Pass, before: _Pass | None, after: _Pass | None) -> None:
    """Counts what moves beside passes of blocks."""
    i, own = this.instruction, this.scattered
    if this.times > 1:  # all of them but the last
        within[i, _COLUMN[this.back, Unit.BLOCK, own]] += this.times - 1
    left = own if this.times > 1 else before.scattered if before else Unit.NOTHING
    gathered = after.gathered if after else Unit.NOTHING
    if this.times > 1 or (before is not None and before.instruction == i):
        within[i, _COLUMN[this.back, gathered, left]] += 1
        return
    within[i, _COLUMN[this.back, gathered, Unit.NOTHING]] += 1
    between[i, _COLUMN[this.back, gathered, left]] += 1
    between[i, _COLUMN[this.back, gathered, Unit.NOTHING]] -= 1


def _around(within: FloatArray, between: FloatArray, this: _Pass, before: _Pass | None, after: _Pass | None) -> None:
    """Counts waits around what is no block."""
    i = this.instruction
    left = before.scattered if before else Unit.NOTHING
    if this.unit is Unit.BEFORE and not this.back:
        wait = Wait.BETWEEN if left is Unit.BEFORE else Wait.BEGINS_LEFT if left is Unit.BLOCK else Wait.BEGINS
        within[i, _WAITS + wait] += 1
    elif after is not None and after.gathered is Unit.BLOCK and this.back:
        ends = this.unit is Unit.BEFORE
        (between if ends else within)[after.instruction, _WAITS + (Wait.ENDS if ends else Wait.TURNS)] += 1


def gather_quantities(q: FloatArray, moved: FloatArray, ends: FloatArray, share: float) -> tuple[FloatArray, np.ndarray]:
    """Adds copies out of and into the buffers of messages to passes, and seconds of what lies beside passes and of waits.

    Args:
        q: Seconds of every `Part` (profiles, parts).
        moved: Of each stage, zero where nothing is gathered; see `simtrain.planner.arrays.stages.StageRow.moved_s`.
        ends: What the last pass takes before the blocks, of what stands before them forward and of what stands behind them backward, and
            the last of what stands before them backward.
        share: Of the multiprocessors that a message takes from a pass beside it.

    Returns:
        Seconds of all quantities (profiles, `WIDE`), and where what moves beside passes of blocks takes longer than they do.
    """
    wide = np.zeros((len(q), WIDE))
    wide[:, :WIDTH] = q
    first, last = moved[:, 0], moved[:, -1]
    wide[:, [Part.FORWARD, Part.FORWARD_BEFORE, Part.BACKWARD_BEFORE]] += first[:, [4, 6, 7]]
    wide[:, Part.BACKWARD] += first[:, 4] + first[:, 5]
    wide[:, [Part.FORWARD_BEHIND, Part.BACKWARD_BEHIND]] += last[:, 6:]
    gathers = np.stack([np.zeros(len(q)), first[:, 0], first[:, 2], last[:, 2]])
    scatters = np.stack([np.zeros(len(q)), first[:, 1], first[:, 3], last[:, 3]])
    forward, backward = wide[:, Part.FORWARD], wide[:, Part.BACKWARD]
    for back, gathered, scattered in BESIDE:
        alone = backward if back else forward
        moves = gathers[gathered] + scatters[scattered]
        wide[:, _COLUMN[back, gathered, scattered]] = np.maximum(alone + share * np.minimum(moves, alone), moves) - alone
    sharded = first[:, 0] > 0
    wide[sharded, _WAITS:] = _waits(wide[sharded], first[sharded], ends[sharded])
    return wide, np.asarray((first[:, 0] > forward) | (first[:, 0] + first[:, 1] > backward))


def _waits(q: FloatArray, moved: FloatArray, ends: FloatArray) -> FloatArray:
    """Seconds of every `Wait`."""
    gather, scatter, rest_gather, rest_scatter = moved[:, :4].T
    embed, back = q[:, Part.FORWARD_BEFORE], q[:, Part.BACKWARD_BEFORE]
    issued, issued_back = embed - ends[:, 0], back - ends[:, 2]
    found = np.zeros((len(q), len(Wait)))
    found[:, Wait.BEGINS] = issued + gather - embed
    found[:, Wait.BEGINS_LEFT] = np.maximum(scatter, issued) + gather - embed
    found[:, Wait.ENDS] = np.maximum(scatter, issued_back) + gather - back
    found[:, Wait.TURNS] = gather - ends[:, 1]
    there = np.maximum(np.maximum(scatter, issued_back) + rest_gather - back, 0.0)
    found[:, Wait.BETWEEN] = there + np.maximum(np.maximum(rest_scatter, issued) + gather - embed, 0.0)
    return np.maximum(found, 0.0)
