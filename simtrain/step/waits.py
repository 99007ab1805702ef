"""What the terms of a program wait for, once they are in order: the one before on their stream, their host, room in its launch queue."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray

Carry = tuple[int, int, float]
"""A term, one that waits for it in the next step, and how much longer."""


class Works(NamedTuple):
    """Kernels that a host issues and a device runs.

    Attributes:
        lane: Of whom.
        asks: Term in which the host waits for a result first (-1 for none).
        issues: Term in which it issues them (-1 where it computes itself).
        runs: Term in which the device runs them.
        lead_s: How long after the host starts issuing the device must start.
        launches: Kernels.
    """

    lane: IntArray
    asks: IntArray
    issues: IntArray
    runs: IntArray
    lead_s: FloatArray
    launches: IntArray

    def numbered(self, number: IntArray) -> Works:
        """The same with new numbers for terms, lane by lane in the order in which they run."""
        order = np.lexsort((number[self.runs], self.lane))
        lane, asks, issues, runs, lead_s, launches = (column[order] for column in self)
        asks, issues, runs = (np.where(terms >= 0, number[terms], -1) for terms in (asks, issues, runs))
        return Works(lane, asks, issues, runs, lead_s, launches)


def on_streams(stream: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """The term before each on its stream (-1 for none), and the first and last term of each stream that has any.

    Args:
        stream: Of each term.
    """
    short = len(stream) > 0 and stream.max() < 2**16
    order = np.argsort(stream.astype(np.uint16) if short else stream, kind="stable")  # short ones sort faster
    same = stream[order[1:]] == stream[order[:-1]]
    before = np.full(len(stream), -1)
    before[order[1:][same]] = order[:-1][same]
    return before, order[np.append(True, ~same)], order[np.append(~same, True)]


def launched(works: Works | None, before: IntArray, lanes: int, run_ahead: int) -> tuple[IntArray, FloatArray, list[Carry]]:
    """What kernels and hosts wait for beside the term before: one term at most (-1 for none), its lag, and what in the step before.

    Args:
        works: Sorted by lane; `None` without hosts.
        before: The term before each on its stream.
        lanes: How many there are.
        run_ahead: Launches that fit in a queue.
    """
    waits, lag_s = np.full(len(before), -1), np.zeros(len(before))
    if works is None:
        return waits, lag_s, []
    lane, asks, issues, runs, lead_s, launches = works
    asking = asks >= 0
    waits[asks[asking]] = before[runs[asking]]
    led = before[issues] >= 0
    waits[runs[led]], lag_s[runs[led]] = before[issues[led]], lead_s[led]
    bounds = np.searchsorted(lane, np.arange(lanes + 1))
    first, end = bounds[:-1], bounds[1:]
    issued = np.cumsum(launches)
    # the host waits for the kernels that must have run before there is room for these
    room = np.searchsorted(issued, issued - run_ahead)
    full = np.flatnonzero(room > first[lane])
    waits[issues[full]] = runs[room[full] - 1]
    first, end = first[end > first], end[end > first]
    # the device must have finished the step before when the queue is full for the first time (at most one step ahead)
    limit = np.searchsorted(issued, issued[first] - launches[first] + run_ahead, side="right")
    limit = np.minimum(limit, end - 1)
    opens = zip(issues[end - 1].tolist(), runs[first].tolist(), lead_s[first].tolist(), strict=True)
    fills = zip(runs[end - 1].tolist(), issues[limit].tolist(), strict=True)
    pairs = zip(led[first].tolist(), opens, fills, strict=True)
    carries = [carry for follows, opening, (a, b) in pairs for carry in ([] if follows else [opening]) + [(a, b, 0.0)]]
    return waits, lag_s, carries


def joined(
    before: IntArray, launch: IntArray, launch_lag_s: FloatArray, owner: IntArray, source: IntArray
) -> tuple[IntArray, IntArray, FloatArray]:
    """CSR pointer, predecessors and lags of all terms.

    Args:
        before: What each waits for first (-1 for none),
        launch: what second (-1 for none),
        launch_lag_s: and how much longer.
        owner: Terms that wait for others, any number of times each, ...
        source: ... and for whom.
    """
    has_before, has_launch, others = before >= 0, launch >= 0, np.bincount(owner, minlength=len(before))
    pointer = pointer_of(others + has_before + has_launch)
    predecessor, lag_s = np.empty(pointer[-1], dtype=np.int64), np.zeros(pointer[-1])
    at = pointer[:-1]
    predecessor[at[has_before]] = before[has_before]
    at = (at + has_before)[has_launch]
    predecessor[at], lag_s[at] = launch[has_launch], launch_lag_s[has_launch]
    order = np.argsort(owner, kind="stable")
    # those of a term stand at the end of its own
    shift = pointer[1:] - np.cumsum(others)
    predecessor[shift[owner[order]] + np.arange(len(order))] = source[order]
    return pointer, predecessor, lag_s


def pointer_of(count: IntArray) -> IntArray:
    """CSR pointer of rows with so many entries."""
    pointer = np.zeros(len(count) + 1, dtype=np.int64)
    np.cumsum(count, out=pointer[1:])
    return pointer
