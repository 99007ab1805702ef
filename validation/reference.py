"""The reference workload: a fixed pair of small steps that tells how fast the machine is at the moment.

One core of a shared server changes its speed by 10 to 20 % over minutes, far more than steps vary within a process (3 %). The reference is
therefore timed in the same process directly before and after each measured step, in calibration as in validation, and a measured time is
expressed at the speed that the machine had on average in its calibration: measured time x reference in the profile / reference beside it.

The reference was fixed before anything was measured with it, and nothing of it is fitted to steps that are predicted. It is the sum of a
GPT and of a convolutional network, of about equal time: what slows a core (clock rate, the other thread of its physical core, neighbours
in cache and memory) slows products, convolutions and memory-bound operators differently, and one number for all steps has to stand in the
middle. What slows kinds of operators apart is not corrected. A GPU has no reference: steps this small measure its host.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from validation.measurement import Measurement
from validation.steps import REFERENCE_STEPS

if TYPE_CHECKING:
    from validation.backend import Backend

REFERENCE = " + ".join(step.name for step in REFERENCE_STEPS)
"""What the reference is; a profile with another one is taken as one without."""
REPETITIONS = 3
"""Timed runs of each part before a measured step, and again after it."""
WARMUP_STEPS = 2


class Reference:
    """The reference workload, set up in a measuring process.

    Args:
        device: Where it runs.
        repetitions: Timed runs of each part; their median counts, as it does of measured steps.
    """

    def __init__(self, device: Backend, repetitions: int) -> None:
        from validation.training import Training

        self._device, self._repetitions = device, repetitions
        self._parts = [Training(step, device) for step in REFERENCE_STEPS]
        for part in self._parts:
            for _ in range(WARMUP_STEPS):
                part.step()

    def time_s(self) -> float:
        """Returns the time of both parts together, now."""
        return sum(median(self._device.timed_steps_s(part, self._repetitions, lambda _: None)[0]) for part in self._parts)


def reference_time_s(measurements: Sequence[Measurement]) -> float:
    """Returns the reference's median time over all processes of some measurements, 0 where it was not timed beside all of them."""
    times = [time_s for m in measurements for time_s in m.reference_times_s]
    return median(times) if measurements and all(m.reference_times_s for m in measurements) else 0.0
