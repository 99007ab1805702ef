"""Times a step apart: passes of a micro-batch, and what happens once a step. On a GPU by events, which wait for nothing."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class StepClock:
    """Times those steps for which `timed` is set.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.timed = False
        self._events = device.type == "cuda"
        self._marks: list[Any] = []
        self._done: list[Any] = []

    def begin(self) -> None:
        """A step begins."""
        self._marks = []
        self._mark()

    def passed(self) -> None:
        """A micro-batch's backward pass was issued."""
        self._mark()

    def end(self) -> None:
        """The step has ended."""
        self._mark()
        if self.timed:
            self._done = self._marks

    def read(self) -> tuple[float, float] | None:
        """Returns seconds of a micro-batch and seconds once a step of the last timed step, `None` if there was none since.

        What ranks do in the last micro-batch beyond the others counts as once a step. Waits for the device.
        """
        if not self._done:
            return None
        marks, self._done = self._done, []
        if self._events:
            torch.cuda.synchronize()
            spans = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
        else:
            spans = [b - a for a, b in pairwise(marks)]
        passes = spans[:-1]
        pass_s = sum(passes[:-1]) / len(passes[:-1]) if len(passes) > 1 else passes[0]
        return pass_s, max(sum(spans) - pass_s * len(passes), 0.0)

    def _mark(self) -> None:
        if not self.timed:
            return
        if self._events:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
