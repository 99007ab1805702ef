"""Where the time of a step goes: the gaps of a rank's compute stream, each attributed to what it waits for."""

from __future__ import annotations

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import Program, TermKind

BUSY_PARTS = {
    TermKind.FORWARD: "compute",
    TermKind.BACKWARD: "compute",
    TermKind.RECOMPUTE: "recompute",
    TermKind.GRADIENT_COPY: "communication",
    TermKind.OPTIMIZER: "optimizer",
}
PARTS = ("compute", "recompute", "optimizer", "communication", "offload", "host", "bubble", "wait")
"""Parts of a breakdown: busy with the model's own work, recomputing, updating, communicating (inside layers, copying and waiting for
gradients and parameters), waiting for what was moved to the host or is updated there, for the host to issue, for other pipeline stages,
for slower ranks."""


def breakdown(program: Program, start_s: FloatArray, end_s: FloatArray, period_s: float, rank_class: int) -> dict[str, float]:
    """Splits the period of a rank class by exposure; the parts sum to the period.

    Args:
        program: What was executed.
        start_s: Start of each term in one steady step.
        end_s: End of each term.
        period_s: The step time.
        rank_class: Whose compute stream.
    """
    parts, alone_s = dict.fromkeys(PARTS, 0.0), program.durations_s()
    stream = next(i for i, s in enumerate(program.streams) if s.rank_classes == (rank_class,) and s.name == "compute")
    terms = np.flatnonzero(program.stream == stream)
    own = [i for i, s in enumerate(program.streams) if rank_class in s.rank_classes]
    collectives, offloaded = (
        np.flatnonzero((program.kind == kind) & np.isin(program.stream, own)) for kind in (TermKind.COLLECTIVE, TermKind.OFFLOAD)
    )
    # one period: from the end of the last term of the step before to the end of the last term of this one
    previous_end = float(end_s[terms[-1]]) - period_s
    for term in terms:
        _work(parts, program, int(term), float(end_s[term] - start_s[term]), float(alone_s[term]))
        gap = float(start_s[term]) - previous_end
        if gap > 0:
            _attribute(parts, program, int(term), previous_end, gap, start_s, end_s, period_s, collectives, offloaded)
        previous_end = float(end_s[term])
    return parts


def _work(parts: dict[str, float], program: Program, term: int, duration_s: float, alone_s: float) -> None:
    """Splits a term's work; slowed down, all its parts take longer alike."""
    pace = duration_s / alone_s if alone_s else 1.0
    recompute, wire = pace * float(program.recompute_s[term]), pace * float(program.wire_s[term])
    parts["recompute"] += recompute
    parts["communication"] += wire
    parts[BUSY_PARTS[TermKind(int(program.kind[term]))]] += duration_s - recompute - wire


def _attribute(
    parts: dict[str, float],
    program: Program,
    term: int,
    gap_start: float,
    gap: float,
    start_s: FloatArray,
    end_s: FloatArray,
    period_s: float,
    collectives: np.ndarray,
    offloaded: np.ndarray,
) -> None:
    binding = _binding(program, term, end_s, period_s)
    if binding is None or program.kind[binding] == TermKind.HOST:
        parts["host"] += gap
        return
    if program.kind[binding] == TermKind.OFFLOAD:
        parts["offload"] += gap
        return
    if program.kind[binding] == TermKind.SEND:  # of another stage, which may have waited for its host itself
        fetched = _covered(offloaded, gap_start, gap, start_s, end_s, period_s)
        parts["offload"] += fetched
        parts["bubble"] += gap - fetched
        return
    # the collective that ends the gap may itself have waited for slower ranks: only its transfers count as communication
    moving = min(_running(collectives, gap_start, gap, start_s, end_s, period_s), gap)
    fetched = min(_running(offloaded, gap_start, gap, start_s, end_s, period_s), gap - moving)
    parts["communication"] += moving
    parts["offload"] += fetched
    parts["wait"] += gap - moving - fetched


def _running(terms: np.ndarray, gap_start: float, gap: float, start_s: FloatArray, end_s: FloatArray, period_s: float) -> float:
    """How long terms run within a gap, in this step or in the one before."""
    total = 0.0
    for shift in (0.0, -period_s):
        low = np.maximum(start_s[terms] + shift, gap_start)
        high = np.minimum(end_s[terms] + shift, gap_start + gap)
        total += float(np.maximum(high - low, 0.0).sum())
    return total


def _covered(terms: np.ndarray, gap_start: float, gap: float, start_s: FloatArray, end_s: FloatArray, period_s: float) -> float:
    """How much of a gap there is a term that runs, in this step or in the one before."""
    low, high = (np.clip(np.concatenate([at[terms], at[terms] - period_s]), gap_start, gap_start + gap) for at in (start_s, end_s))
    order = np.argsort(low)
    reached = np.maximum.accumulate(np.concatenate([[gap_start], high[order]]))
    return float(np.maximum(high[order] - np.maximum(low[order], reached[:-1]), 0.0).sum())


def _binding(program: Program, term: int, end_s: FloatArray, period_s: float) -> int | None:
    """The predecessor (in this step or carried from the last) that the term waited for."""
    best, at = None, -np.inf
    for j in range(int(program.predecessor_pointer[term]), int(program.predecessor_pointer[term + 1])):
        time = float(end_s[program.predecessor[j]] + program.predecessor_lag_s[j])
        if time > at:
            best, at = int(program.predecessor[j]), time
    for source, lag in zip(
        program.carry_source[program.carry_target == term], program.carry_lag_s[program.carry_target == term], strict=True
    ):
        time = float(end_s[source] + lag) - period_s
        if time > at:
            best, at = int(source), time
    return best


def busy_s(program: Program, start_s: FloatArray, end_s: FloatArray, rank_class: int) -> dict[str, float]:
    """Seconds in a step that each stream of a rank class is busy (those that it shares included)."""
    result: dict[str, float] = {}
    for i, stream in enumerate(program.streams):
        if rank_class in stream.rank_classes:
            chosen = program.stream == i
            result[stream.name] = result.get(stream.name, 0.0) + float((end_s[chosen] - start_s[chosen]).sum())
    return result
