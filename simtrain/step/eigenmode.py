"""The steady state of a program from max-plus spectral theory, for programs that do not show it when their step is repeated.

The end of a term is the latest of the ends that it waits for plus a constant: a linear system over (max, +). In the long run each term
grows per step by the largest mean, in seconds per step boundary, of the cycles of waiting that lead to it (Baccelli, Cohen, Olsder and
Quadrat 1992, chapter 3); the step takes as long as the slowest term grows. Steps need not be alike for that: where the slowest cycle goes
through two lanes on both sides of a step boundary, each step repeats the one before the last. And not all terms need grow alike: nobody
holds up those that wait for fast cycles alone. Both are so in general, and in both cases there are times `ends + step * growth` that the
program follows forever. Howard's policy iteration finds them (Cochet-Terrasson, Cohen, Gaubert, McGettrick and Quadrat 1998, "Numerical
computation of spectral elements in max-plus algebra", recalled, abstract looked up): choose for each term one that it waits for, work out
the times if it waited for that one alone, choose better ones, until there are none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InternalError
from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray, Program

MAX_ROUNDS = 1000
"""Of choices; some ten are usual."""
TOLERANCE = 1e-12
"""Relative difference of times that rounding may cause."""


@dataclass(frozen=True, slots=True, eq=False)
class _Edges:
    """What waits for what, sorted by who waits; every term waits for something."""

    source: IntArray
    target: IntArray
    weight_s: FloatArray  # from the end of the source to that of the target
    crosses: IntArray  # 1 if the source belongs to the step before, else 0
    first: IntArray  # edge of each target

    @classmethod
    def of(cls, program: Program, durations_s: FloatArray) -> _Edges:
        count = len(program)
        owner = np.repeat(np.arange(count), np.diff(program.predecessor_pointer))
        # what waits for nothing begins at the same moment in every step: it waits for itself, for no time at all
        free = np.setdiff1d(np.arange(count), np.concatenate([owner, program.carry_target]))
        source = np.concatenate([program.predecessor, program.carry_source, free])
        target = np.concatenate([owner, program.carry_target, free])
        lag_s = np.concatenate([program.predecessor_lag_s, program.carry_lag_s, -durations_s[free]])
        crosses = np.repeat([0, 1], [len(owner), len(target) - len(owner)])
        order = np.argsort(target, kind="stable")
        target = target[order]
        weight_s = lag_s[order] + durations_s[target]
        return cls(source[order], target, weight_s, crosses[order], np.searchsorted(target, np.arange(count)))


def eigenmode(program: Program, durations_s: FloatArray, ends_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Times that a program follows forever: in step k, from some step on, a term ends at `ends + k * growth`.

    Args:
        program: What is executed.
        durations_s: Of each term.
        ends_s: Of each term in the first step: from where to search.

    Returns:
        Growth and ends of each term. Terms that grow less are so far ahead that they delay no others.

    Raises:
        InternalError: No best choice was found in `MAX_ROUNDS` rounds.
    """
    edges = _Edges.of(program, durations_s)
    choice, _ = _better(edges, np.full(len(program), ends_s.max()), ends_s)
    for _ in range(MAX_ROUNDS):
        growth_s, ends_s = _values(edges, choice, ends_s)
        chosen, gains = _better(edges, growth_s, ends_s)
        if not gains.any():
            return growth_s, _ahead(edges, growth_s, ends_s)
        choice = np.where(gains, chosen, choice)
    raise InternalError(f"the slowest cycle of a program was not found in {MAX_ROUNDS} rounds")


def _values(edges: _Edges, choice: IntArray, ends_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Growth and ends of the terms if each waited for one other alone; on each cycle one of them keeps its end."""
    source: list[int] = edges.source[choice].tolist()
    weight: list[float] = edges.weight_s[choice].tolist()
    crosses: list[int] = edges.crosses[choice].tolist()
    ends: list[float] = ends_s.tolist()
    growth, visit = [0.0] * len(ends), [-1] * len(ends)
    for begin in range(len(ends)):
        path, term = [], begin
        while visit[term] < 0:
            visit[term] = begin
            path.append(term)
            term = source[term]
        if path and visit[term] == begin:
            cycle = path[path.index(term) :]
            growth[term] = sum(weight[i] for i in cycle) / sum(crosses[i] for i in cycle)
        for i in reversed(path):
            if i != term:
                growth[i] = growth[source[i]]
                ends[i] = ends[source[i]] + weight[i] - crosses[i] * growth[i]
    return _rounded(np.array(growth)), np.array(ends)


def _rounded(growth_s: FloatArray) -> FloatArray:
    """Makes growths equal that differ by rounding, as those of equal lanes may."""
    values, which = np.unique(growth_s, return_inverse=True)
    last = np.append(np.diff(values) > TOLERANCE * values[-1], True)
    rounded: FloatArray = values[last][np.searchsorted(np.flatnonzero(last), which)]
    return rounded


def _better(edges: _Edges, growth_s: FloatArray, ends_s: FloatArray) -> tuple[IntArray, np.ndarray]:
    """For each term the edge that makes it grow most and, among those, end latest, and whether that is more than rounding."""
    fastest = np.maximum.reduceat(growth_s[edges.source], edges.first)
    arrives = ends_s[edges.source] + edges.weight_s - edges.crosses * fastest[edges.target]
    arrives[growth_s[edges.source] < fastest[edges.target]] = -np.inf
    latest = np.maximum.reduceat(arrives, edges.first)
    chosen = np.empty_like(edges.first)
    best = np.flatnonzero(arrives == latest[edges.target])
    chosen[edges.target[best]] = best
    slack = TOLERANCE * (np.abs(ends_s).max() + growth_s.max())
    return chosen, (fastest > growth_s) | (latest > ends_s + slack)


def _ahead(edges: _Edges, growth_s: FloatArray, ends_s: FloatArray) -> FloatArray:
    """Puts terms that grow less ahead of those who wait for them, by a whole step; those that nobody waits for end with the others."""
    ends_s, period_s = ends_s.copy(), growth_s.max()
    for growth in np.unique(growth_s)[-2::-1]:
        own = growth_s == growth
        for_others = own[edges.source] & ~own[edges.target]
        arrives = ends_s[edges.source] + edges.weight_s - edges.crosses * period_s - ends_s[edges.target]
        late = arrives[for_others].max(initial=-np.inf)
        ends_s[own] -= late + period_s if np.isfinite(late) else ends_s[own].max() - ends_s[growth_s > growth].max()
    return ends_s
