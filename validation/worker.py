"""The process that trains: reads a request as JSON from its input, writes one JSON line per training step to its output.

Run as `python -P -m validation.worker` by `validation.measure`, which fixes core, threads and allocator through the environment.
"""

from __future__ import annotations

import json
import sys
from statistics import median, quantiles
from typing import Any

from validation.backend import Backend, backend
from validation.measurement import Settings
from validation.reference import Reference
from validation.steps import TrainingStep


def time_step(step: TrainingStep, settings: Settings, device: Backend, reference: Reference | None = None) -> dict[str, Any]:
    """Measures step time, noise, page faults and, if asked, times inside operators and the reference workload before and after."""
    from validation.operator_times import ClassTimes
    from validation.training import Training

    training, classes = Training(step, device), ClassTimes(device.kernel_class)
    for _ in range(settings.warmup_steps):
        training.step()

    def operators(i: int) -> None:
        # in turn with the timed steps, so that a machine that drifts does so for both
        if i < settings.operator_steps:
            device.operator_times(training, classes)

    before_s = reference.time_s() if reference else 0.0
    times_s, faults = device.timed_steps_s(training, settings.timed_steps, operators)
    after_s = reference.time_s() if reference else 0.0
    lower, middle, upper = quantiles(times_s, n=4) if len(times_s) > 1 else times_s * 3
    return {
        "step_time_s": median(times_s),
        "noise": (upper - lower) / middle,
        "page_faults_per_step": median(faults),
        "class_times_s": classes.seconds(),
        "class_calls": classes.calls(),
        "call_times_s": classes.each_s(),
        "reference_time_s": (before_s + after_s) / 2,
    }


def memory_of_step(step: TrainingStep, device: Backend, steps: int = 2) -> dict[str, Any]:
    """Measures the allocation peak of building a model and training it (optimizer states appear in the first step)."""
    from validation.training import Training

    def run() -> None:
        training = Training(step, device)
        for _ in range(steps):
            training.step()

    peak, reserved = device.peak_bytes(run, held=0, others=0)
    return {"peak_memory_bytes": peak, "reserved_memory_bytes": reserved}


def main() -> None:
    """Answers one request."""
    request = json.loads(sys.stdin.read())
    settings = Settings(**request["settings"])
    device = backend(settings.device)
    device.prepare(request["core"], settings.threads)
    repetitions = 0 if request["memory"] else settings.reference_repetitions
    reference = Reference(device, repetitions) if repetitions else None
    for data in request["steps"]:
        step = TrainingStep.from_dict(data)
        answer = memory_of_step(step, device) if request["memory"] else time_step(step, settings, device, reference)
        sys.stdout.write(json.dumps({"name": step.name} | answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
