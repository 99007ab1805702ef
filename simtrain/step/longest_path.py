"""The periodic steady state of a program under frozen rates: longest paths, step after step, until every step takes the same time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InternalError
from simtrain.core.polynomial import FloatArray
from simtrain.core.program import Program, TermKind

MAX_STEPS = 64
PATIENCE = 8
"""Steps after which steps that are alike are skipped."""
TOLERANCE = 1e-11
"""Relative difference between the growth of any two terms below which the step counts as periodic."""


@dataclass(frozen=True, slots=True, eq=False)
class Steady:
    """One step of the steady state.

    Attributes:
        period_s: Time from one step to the next.
        start_s: Start of each term; the step before it began one period earlier.
        end_s: End of each term.
    """

    period_s: float
    start_s: FloatArray
    end_s: FloatArray


def steady_state(program: Program, durations_s: FloatArray) -> Steady:
    """Repeats the step until its period no longer changes.

    A program without cycles but with carried edges is a max-plus linear system: its state grows by a constant per step after finitely
    many steps (Baccelli, Cohen, Olsder and Quadrat 1992, theorem 3.109). The period is that constant. A host that is faster than its
    device needs many steps until it is as far ahead as it may be; it starts level and only gains, so it delays nobody on the way, and
    the step counts as periodic once all other terms grow alike. Where a device that its own host holds up gains on the others only
    slowly, as many steps as have passed are skipped at once: the period does not depend on where one begins.

    Args:
        program: What is executed.
        durations_s: Of each term.

    Raises:
        InternalError: The period has not settled after `MAX_STEPS` steps.
    """
    durations = durations_s.tolist()
    pointer, predecessor = program.predecessor_pointer.tolist(), program.predecessor.tolist()
    lags = program.predecessor_lag_s.tolist()
    carries = list(zip(program.carry_source.tolist(), program.carry_target.tolist(), program.carry_lag_s.tolist(), strict=True))
    ready = [0.0] * len(program)
    before: FloatArray | None = None
    grew: FloatArray | None = None
    working = program.kind != TermKind.HOST
    for step in range(MAX_STEPS):
        start, end = _pass(durations, pointer, predecessor, lags, ready)
        ends = np.array(end)
        if before is not None:
            growth = ends - before
            period = float(growth.max())
            if period - float(growth[working].min()) <= TOLERANCE * float(ends.max()):
                return Steady(period, np.array(start), ends)
            if step > PATIENCE and grew is not None and float(np.abs(growth - grew).max()) <= TOLERANCE * float(ends.max()):
                ends = ends + step * growth
                end, growth = ends.tolist(), np.full(len(ends), np.inf)
            grew = growth
        before = ends
        ready = [0.0] * len(program)
        for source, target, lag in carries:
            ready[target] = max(ready[target], end[source] + lag)
    raise InternalError(f"the step has not become periodic after {MAX_STEPS} steps")


def _pass(
    durations: list[float], pointer: list[int], predecessor: list[int], lags: list[float], ready: list[float]
) -> tuple[list[float], list[float]]:
    start = [0.0] * len(durations)
    end = [0.0] * len(durations)
    for i, duration in enumerate(durations):
        begin = ready[i]
        for j in range(pointer[i], pointer[i + 1]):
            earliest = end[predecessor[j]] + lags[j]
            begin = max(begin, earliest)
        start[i] = begin
        end[i] = begin + duration
    return start, end
