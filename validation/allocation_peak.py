"""Peak memory of a real training step, from the events of PyTorch's own allocator.

Every allocation and release that passes through the allocator is seen, operator-internal buffers included. Resident memory of the
process is no ground truth: it holds what the C library keeps back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def allocation_peak_bytes(run: Callable[[], object]) -> int:
    """Runs a function and returns the largest amount that was allocated at once, counted from nothing at its start.

    Args:
        run: Builds the model itself, so that parameters are counted.
    """
    import torch
    from torch._C._profiler import _EventType

    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    recorded: Any = profile.profiler
    tree = recorded.kineto_results.experimental_event_tree()
    events = sorted((e for e in _walk(tree) if e.tag == _EventType.Allocation), key=lambda e: e.start_time_ns)
    if not events:
        return 0
    before = events[0].extra_fields.total_allocated - events[0].extra_fields.alloc_size
    return max(int(e.extra_fields.total_allocated) for e in events) - int(before)


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    stack = list(events)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)
