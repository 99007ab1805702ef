"""What collectives take from the computation that they run beside: multiprocessors.

While a collective runs, its kernels occupy a share of the device's multiprocessors (`Runtime.communication_share`), so that everything
computed meanwhile goes on at what is left.
"""

from __future__ import annotations

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import Program, TermKind
from simtrain.step.longest_path import Recursion, Steady, steady_state

ROUNDS = 2
"""Times that overlaps are found and priced anew; slower computation hardly moves what overlaps."""


def contended_state(program: Program, share: float) -> tuple[Steady, FloatArray]:
    """The steady state in which computation is slowed where collectives run beside it, and the durations that make it.

    Args:
        program: What is executed.
        share: Of the multiprocessors that a collective takes.
    """
    alone, recursion = program.durations_s(), Recursion(program)
    durations = alone
    steady = steady_state(program, durations, recursion)
    if share == 0 or not np.any(program.kind == TermKind.COLLECTIVE):
        return steady, durations
    for _ in range(ROUNDS):
        durations = alone + share * overlaps_s(program, steady)
        steady = steady_state(program, durations, recursion)
    return steady, durations


def overlaps_s(program: Program, steady: Steady) -> FloatArray:
    """For each computing term, how long collectives of its ranks run beside it."""
    result = np.zeros(len(program))
    for lane in range(len(program.rank_classes)):
        own = [i for i, s in enumerate(program.streams) if lane in s.rank_classes]
        moving = np.flatnonzero(np.isin(program.stream, own) & (program.kind == TermKind.COLLECTIVE))
        compute = [i for i in own if program.streams[i].name == "compute"]
        working = np.flatnonzero(np.isin(program.stream, compute))
        if len(moving):
            result[working] = overlap_s(
                steady.start_s[working], steady.end_s[working], steady.start_s[moving], steady.end_s[moving], steady.period_s
            )
    return result


def overlap_s(start_s: FloatArray, end_s: FloatArray, other_start_s: FloatArray, other_end_s: FloatArray, period_s: float) -> FloatArray:
    """How long any of some intervals, which recur every period (never, if it is infinite), runs beside each of others."""
    shifts = period_s * np.arange(-1, 2) if np.isfinite(period_s) else np.zeros(1)
    begins, ends = (np.sort(np.add.outer(shifts, x).ravel()) for x in (other_start_s, other_end_s))
    # the union: a new interval begins where all before have ended
    latest = np.maximum.accumulate(ends)
    first = np.concatenate([[True], begins[1:] > latest[:-1]])
    opens = begins[first]
    closes = np.concatenate([latest[np.flatnonzero(first)[1:] - 1], latest[-1:]])
    covered = np.concatenate([[0.0], np.cumsum(closes - opens)])

    def until(moment: FloatArray) -> FloatArray:
        index = np.searchsorted(opens, moment, side="right")
        inside = np.where(index > 0, np.minimum(moment, closes[index - 1]) - opens[index - 1], 0.0)
        return np.asarray(np.where(index > 0, covered[index - 1] + inside, 0.0))

    return until(end_s) - until(start_s)
