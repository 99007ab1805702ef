"""What the terms of a program wait for, once they are in order: the one before on their stream, their host, room in its launch queue."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray

Carry = tuple[int, int, float]
"""A term, one that waits for it in the next step, and how much longer."""

Waits = tuple[IntArray, IntArray, FloatArray | None]
"""Terms, what each waits for, and how much longer (`None` for not at all)."""


class Works(NamedTuple):
    """Kernels that a host issues and a device runs.

    Attributes:
        lane: Of whom.
        issues: Term in which the host issues them (the one that runs them where there is no host).
        runs: Term in which the device runs them.
        lead_s: How long after the host starts issuing the device must start.
        launches: Kernels.
        passes: How many passes through layers they are.
    """

    lane: IntArray
    issues: IntArray
    runs: IntArray
    lead_s: FloatArray
    launches: IntArray
    passes: IntArray

    def numbered(self, number: IntArray) -> Works:
        """The same with new numbers for terms."""
        return self._replace(issues=number[self.issues], runs=number[self.runs])

    def by_lane(self, terms: int) -> Works:
        """The same lane by lane, in the order in which they run; `terms` is more than any of their numbers."""
        order = np.argsort(self.lane * terms + self.runs, kind="stable")
        lane, issues, runs, lead_s, launches, passes = self
        return Works(lane[order], issues[order], runs[order], lead_s[order], launches[order], passes[order])


def on_streams(stream: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """The term before each on its stream (-1 for none), and the first and last term of each stream that has any.

    Args:
        stream: Of each term.
    """
    # short numbers sort faster
    order = np.argsort(stream.astype(np.uint16) if stream.max() < 2**16 else stream, kind="stable")
    sorted_by = stream[order]
    begins = np.flatnonzero(np.append(True, sorted_by[1:] != sorted_by[:-1]))
    first, last = order[begins], order[np.append(begins[1:], len(order)) - 1]
    before = np.empty_like(order)
    before[order[1:]] = order[:-1]
    before[first] = -1
    return before, first, last


def led(works: Works, before: IntArray) -> Waits:
    """Kernels wait for their host: it begins to issue them when it has issued what comes before on its stream."""
    issued = before[works.issues]
    later = np.flatnonzero(issued >= 0)
    return works.runs[later], issued[later], works.lead_s[later]


def launched(works: Works, before: IntArray, lanes: int, run_ahead: int) -> tuple[Waits, list[Carry]]:
    """What hosts wait for as their launch queues are full, and what hosts and kernels wait for in the step before.

    Args:
        works: What hosts issue, lane by lane.
        before: The term before each on its stream.
        lanes: How many there are.
        run_ahead: Launches that fit in a queue.
    """
    lane, issues, runs, lead_s, launches, _ = works
    bounds = np.searchsorted(lane, np.arange(lanes + 1))
    first, end = bounds[:-1], bounds[1:]
    issued = np.cumsum(launches)
    # the host waits for the kernels that must have run before there is room for these
    room = np.searchsorted(issued, issued - run_ahead)
    full = np.flatnonzero(room > first[lane])
    first, end = first[end > first], end[end > first]
    waits = (issues[full], runs[room[full] - 1], None)
    # the device must have finished the step before when the queue is full for the first time (at most one step ahead)
    limit = np.searchsorted(issued, issued[first] - launches[first] + run_ahead, side="right")
    limit = np.minimum(limit, end - 1)
    opens = zip(issues[end - 1].tolist(), runs[first].tolist(), lead_s[first].tolist(), strict=True)
    fills = zip(runs[end - 1].tolist(), issues[limit].tolist(), strict=True)
    pairs = zip((before[issues[first]] >= 0).tolist(), opens, fills, strict=True)
    return waits, [carry for follows, opening, (a, b) in pairs for carry in ([] if follows else [opening]) + [(a, b, 0.0)]]


def joined(before: IntArray, waits: list[Waits], owner: IntArray, source: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
    """CSR pointer, predecessors and lags of all terms.

    Args:
        before: What each waits for first (-1 for none).
        waits: What some wait for next; no term occurs twice in all of them.
        owner: Terms that wait for others, any number of times each, ...
        source: ... and for whom.
    """
    others, follows = np.bincount(owner, minlength=len(before)), before >= 0
    count = others + follows
    for terms, _, _ in waits:
        count[terms] += 1
    pointer = pointer_of(count)
    predecessor = np.repeat(before, count)  # all but the first of each are written over
    lag_s, begins = np.zeros(len(predecessor)), pointer[:-1] + follows
    for terms, earlier, lag in waits:
        at = begins[terms]
        predecessor[at] = earlier
        if lag is not None:
            lag_s[at] = lag
    order = np.argsort(owner, kind="stable")
    # those of a term stand at the end of its own
    begins = pointer[1:] - np.cumsum(others)
    predecessor[begins[owner[order]] + np.arange(len(order))] = source[order]
    return pointer, predecessor, lag_s


def pointer_of(count: IntArray) -> IntArray:
    """CSR pointer of rows with so many entries."""
    pointer = np.zeros(len(count) + 1, dtype=np.int64)
    np.cumsum(count, out=pointer[1:])
    return pointer
