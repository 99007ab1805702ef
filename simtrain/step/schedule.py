"""`schedule`: the program under frozen rates, solved to its periodic steady state."""

from __future__ import annotations

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import Program, TermKind
from simtrain.core.result import MemoryReport, Result, TraceEvent
from simtrain.step.breakdown import breakdown, busy_s
from simtrain.step.ledger import Ledger, ledger, report
from simtrain.step.longest_path import steady_state
from simtrain.step.lower import Lowered, lower
from simtrain.step.results import assemble, by_rank
from simtrain.step.setting import Setting


def schedule_setting(setting: Setting) -> Result:
    """Predicts a step by longest path."""
    lowered = lower(setting)
    program, classes = lowered.program, lowered.rank_classes
    steady = steady_state(program, program.durations_s())
    slowest = slowest_class(program, steady.start_s, steady.end_s)
    offset = first_compute_s(program, steady.start_s)
    return assemble(
        setting,
        "schedule",
        steady.period_s,
        breakdown(program, steady.start_s, steady.end_s, steady.period_s, slowest),
        busy_s(program, steady.start_s, steady.end_s, slowest),
        timed_memory(setting, lowered, steady.start_s - offset, steady.end_s - offset, slowest),
        events=trace_events(program, steady.start_s - offset, steady.end_s - offset, steady.period_s),
        busy_by_rank=by_rank(classes, [busy_s(program, steady.start_s, steady.end_s, i)["compute"] for i in range(len(classes))]),
    )


def slowest_class(program: Program, start_s: FloatArray, end_s: FloatArray) -> int:
    """The rank class whose compute stream is busy longest."""
    return max(range(len(program.rank_classes)), key=lambda i: busy_s(program, start_s, end_s, i)["compute"])


def first_compute_s(program: Program, start_s: FloatArray) -> float:
    """When the first device starts to compute: the start of the step that is shown."""
    compute = [i for i, s in enumerate(program.streams) if s.name == "compute"]
    return float(start_s[np.isin(program.stream, compute)].min())


def trace_events(program: Program, start_s: FloatArray, end_s: FloatArray, period_s: float) -> tuple[TraceEvent, ...]:
    """Lists executed terms, for timelines and traces.

    A host issues the first kernels of a step while devices still work on the step before; in a periodic step that is where it issues
    those of the next one, and there they are shown.
    """
    shift = np.where(start_s < 0, np.ceil(-start_s / period_s) * period_s, 0.0)
    start_s, end_s = start_s + shift, end_s + shift
    names = [program.rank_classes[s.rank_class].name if s.rank_class >= 0 else "all ranks" for s in program.streams]
    return tuple(
        TraceEvent(
            name=program.labels[program.label[i]],
            category=TermKind(int(program.kind[i])).name.lower(),
            rank_class=names[program.stream[i]],
            stream=program.streams[program.stream[i]].name,
            start_s=float(start_s[i]),
            duration_s=float(end_s[i] - start_s[i]),
            micro_batch=int(program.micro_batch[i]),
        )
        for i in range(len(program))
    )


def timed_memory(setting: Setting, lowered: Lowered, start_s: FloatArray, end_s: FloatArray, rank_class: int) -> MemoryReport:
    """The ledger with device times: each moment lies inside the compute term of its pass."""
    book = ledger(setting.workload, setting.strategy, setting.precision, setting.runtime, setting.strategy.data)
    times = _moment_times(book, lowered.pass_terms[rank_class], start_s, end_s)
    tightest = min(set(setting.devices), key=lambda d: d.memory.capacity_bytes)
    return report(book, tightest, setting.runtime, tightest.name, times)


def _moment_times(book: Ledger, terms: np.ndarray, start_s: FloatArray, end_s: FloatArray) -> FloatArray:
    times = np.zeros(len(book.labels))
    last = int(book.passes.max())
    for index in range(last + 1):
        chosen = np.flatnonzero(book.passes == index)
        # a ledger that leaves micro-batches out ends early; the optimizer always comes last
        term = terms[-1] if index == last else terms[min(index, len(terms) - 2)]
        if len(chosen):
            times[chosen] = np.linspace(start_s[term], end_s[term], len(chosen), endpoint=False)
    times[0] = times[1] if len(times) > 1 else 0.0
    return np.maximum.accumulate(times)
