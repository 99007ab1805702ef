"""Traces in the Chrome JSON format, which Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

Format: "Trace Event Format", Google, 2016: complete events ("X"), counters ("C") and metadata ("M"), times in microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simtrain.core.errors import InputError
from simtrain.core.result import MemoryKind, Result

_US_PER_S = 1e6


def save_trace(result: Result, path: str | Path) -> None:
    """Writes one step as a trace: a process per rank class, a thread per stream, memory as counters in bytes.

    Args:
        result: From `schedule` or `simulate` (`estimate` keeps no events).
        path: A `.json` file.

    Raises:
        InputError: The result holds no events, or the file cannot be written.
    """
    if not result.events:
        raise InputError(f"the reader {result.reader!r} keeps no events to trace: use schedule or simulate")
    document = {
        "traceEvents": trace_events(result),
        "displayTimeUnit": "ms",
        "otherData": {name: getattr(result, name) for name in ("workload", "cluster", "strategy", "runtime", "reader", "step_time_s")},
    }
    try:
        Path(path).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def trace_events(result: Result) -> list[dict[str, Any]]:
    """Returns the trace as a list of events, times in microseconds."""
    pids = {name: i for i, name in enumerate(dict.fromkeys([e.rank_class for e in result.events] + [result.memory.rank_class]), start=1)}
    streams = dict.fromkeys((e.rank_class, e.stream) for e in result.events)
    tids = {key: i for i, key in enumerate(streams, start=1)}
    named = [_name("process_name", pid, 0, f"rank class {name}") for name, pid in pids.items()]
    named += [_name("thread_name", pids[rank_class], tid, stream) for (rank_class, stream), tid in tids.items()]
    complete = [
        {
            "name": e.name,
            "cat": e.category,
            "ph": "X",
            "ts": e.start_s * _US_PER_S,
            "dur": e.duration_s * _US_PER_S,
            "pid": pids[e.rank_class],
            "tid": tids[e.rank_class, e.stream],
            "args": {"micro_batch": e.micro_batch} if e.micro_batch >= 0 else {},
        }
        for e in result.events
    ]
    return named + complete + _memory_counters(result, pids[result.memory.rank_class])


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _memory_counters(result: Result, pid: int) -> list[dict[str, Any]]:
    timeline = result.memory.timeline
    if timeline is None:
        return []
    used = [i for i, kind in enumerate(MemoryKind) if timeline.bytes_by_kind[:, i].any()]
    kinds = [kind.value for kind in MemoryKind]
    return [
        {
            "name": "memory (bytes)",
            "ph": "C",
            "ts": float(time_s) * _US_PER_S,
            "pid": pid,
            "args": {kinds[i]: float(row[i]) for i in used},
        }
        for time_s, row in zip(timeline.time_s, timeline.bytes_by_kind, strict=True)
    ]
