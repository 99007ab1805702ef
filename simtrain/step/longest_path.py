"""The periodic steady state of a program under frozen rates: longest paths, step after step, until every step takes the same time."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import Program, TermKind
from simtrain.step.eigenmode import eigenmode

MAX_STEPS = 64
"""Steps after which the steady state is no longer awaited but solved for."""
PATIENCE = 8
"""Steps after which steps that are alike are skipped."""
TOLERANCE = 1e-11
"""Relative difference between the growth of any two terms below which the step counts as periodic."""
WIDE = 10
"""Terms that can be looked at together from which on arrays are faster than a loop (measured)."""


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


class Recursion:
    """When each term of a program starts and ends at the earliest, from step to step.

    Terms that follow each other and do not wait for one another are a wave. Where waves are wide, as in a pipeline of many stages, each is
    one operation on arrays.

    Args:
        program: What is executed.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.count = program, len(program)
        self.targets = np.unique(program.carry_target)
        self.slot = np.searchsorted(self.targets, program.carry_target)
        bounds = _waves(program)
        self.wide = self.count >= WIDE * (len(bounds) - 1)
        if self.wide:
            self._prepare(bounds)
        else:
            self.pointer, self.predecessor = program.predecessor_pointer.tolist(), program.predecessor.tolist()
            self.lags: list[float] = program.predecessor_lag_s.tolist()

    def _prepare(self, bounds: list[int]) -> None:
        """What each wave reads: ends of predecessors, and for terms that have none or wait for the step before one more entry."""
        program, count = self.program, self.count
        needed = np.diff(program.predecessor_pointer)
        extra = np.where(needed == 0, count + len(self.targets), -1)
        extra[self.targets] = count + np.arange(len(self.targets))
        more = np.flatnonzero(extra >= 0)
        at = program.predecessor_pointer[more]
        predecessor = np.insert(program.predecessor, at, extra[more])
        lag_s = np.insert(program.predecessor_lag_s, at, 0.0)
        pointer = np.concatenate([[0], np.cumsum(needed + (extra >= 0))])
        begins = np.array(bounds[:-1])
        inside = pointer[:-1] - np.repeat(pointer[begins], np.diff(bounds))
        edges = pointer[bounds].tolist()
        self.views = [
            (a, b, predecessor[p:q], lag_s[p:q], inside[a:b])
            for a, b, p, q in zip(bounds[:-1], bounds[1:], edges[:-1], edges[1:], strict=True)
        ]

    def step(self, durations_s: FloatArray, before_s: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """Starts and ends of the terms of a step.

        Args:
            durations_s: Of each term.
            before_s: Their ends in the step before; `None` for the first.
        """
        ready = np.zeros(len(self.targets))
        if before_s is not None:
            np.maximum.at(ready, self.slot, before_s[self.program.carry_source] + self.program.carry_lag_s)
        return self._by_waves(durations_s, ready) if self.wide else self._by_terms(durations_s, ready)

    def _by_waves(self, durations_s: FloatArray, ready_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        start, end = np.empty(self.count), np.zeros(self.count + len(ready_s) + 1)
        end[self.count : -1] = ready_s
        latest = np.maximum.reduceat
        for a, b, predecessor, lag_s, inside in self.views:
            begin = start[a:b] = latest(end[predecessor] + lag_s, inside)
            end[a:b] = begin + durations_s[a:b]
        return start, end[: self.count]

    def _by_terms(self, durations_s: FloatArray, ready_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        begins = np.zeros(self.count)
        begins[self.targets] = ready_s
        start: list[float] = begins.tolist()
        end = [0.0] * self.count
        pointer, predecessor, lags = self.pointer, self.predecessor, self.lags
        for i, duration in enumerate(durations_s.tolist()):
            begin = start[i]
            for j in range(pointer[i], pointer[i + 1]):
                earliest = end[predecessor[j]] + lags[j]
                begin = max(begin, earliest)
            start[i] = begin
            end[i] = begin + duration
        return np.array(start), np.array(end)


def _waves(program: Program) -> list[int]:
    """Bounds of the longest runs of terms that do not wait for each other."""
    last = np.full(len(program), -1)
    owner = np.flatnonzero(np.diff(program.predecessor_pointer))
    if len(owner):
        last[owner] = np.maximum.reduceat(program.predecessor, program.predecessor_pointer[owner])
    latest: list[int] = np.maximum.accumulate(last).tolist()
    bounds = [0]
    while bounds[-1] < len(program):
        bounds.append(bisect_left(latest, bounds[-1], lo=bounds[-1]))
    return bounds


def steady_state(program: Program, durations_s: FloatArray, recursion: Recursion | None = None) -> Steady:
    """Repeats the step until its period no longer changes.

    A program without cycles but with carried edges is a max-plus linear system: its state grows by a constant per step after finitely
    many steps (Baccelli, Cohen, Olsder and Quadrat 1992, theorem 3.109). The period is that constant. A host that is faster than its
    device needs many steps until it is as far ahead as it may be; it starts level and only gains, so it delays nobody on the way, and
    the step counts as periodic once all other terms grow alike. Where a device that its own host holds up gains on the others only
    slowly, as many steps as have passed are skipped at once: the period does not depend on where one begins. A few programs never show
    their period in that way, or too late: steps that take turns, terms that nobody holds up. Their steady state is solved for
    (`simtrain.step.eigenmode`); the period is that of the terms that grow most, and where steps take turns it is their mean.

    Args:
        program: What is executed.
        durations_s: Of each term.
        recursion: That of the program, if it is there already.
    """
    recursion = recursion or Recursion(program)
    before: FloatArray | None = None
    grew: FloatArray | None = None
    working = program.kind != TermKind.HOST
    for step in range(MAX_STEPS):
        start, end = recursion.step(durations_s, before)
        if before is not None:
            growth = end - before
            period = float(growth.max())
            if period - float(growth[working].min()) <= TOLERANCE * float(end.max()):
                return Steady(period, start, end)
            if step > PATIENCE and grew is not None and float(np.abs(growth - grew).max()) <= TOLERANCE * float(end.max()):
                end = end + step * growth
                growth = np.full(len(end), np.inf)
            grew = growth
        before = end
    growth, end = eigenmode(program, durations_s, recursion.step(durations_s)[1])
    return Steady(float(growth.max()), end - durations_s, end)
