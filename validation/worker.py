"""The process that trains: reads a request as JSON from its input, writes one JSON line per training step to its output.

Run as `python -P -m validation.worker` by `validation.measure`, which fixes core, threads and allocator through the environment.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from statistics import median, quantiles
from typing import Any

from validation.measurement import Settings
from validation.steps import TrainingStep


def time_step(step: TrainingStep, settings: Settings) -> dict[str, Any]:
    """Measures step time, noise, page faults and, if asked, times inside operators."""
    from hardware_models.cpu import kernel_class
    from validation.operator_times import ClassTimes
    from validation.training import Training

    training, classes = Training(step), ClassTimes(kernel_class)
    for _ in range(settings.warmup_steps):
        training.step()
    times_s: list[float] = []
    faults: list[int] = []
    for i in range(settings.timed_steps):
        before = _page_faults()
        start = time.process_time()
        training.step()
        times_s.append(time.process_time() - start)
        faults.append(_page_faults() - before)
        # in turn with the timed steps, so that a machine that drifts does so for both
        if i < settings.operator_steps:
            classes.step(training.passes, training.update)
    lower, middle, upper = quantiles(times_s, n=4) if len(times_s) > 1 else times_s * 3
    return {
        "step_time_s": median(times_s),
        "noise": (upper - lower) / middle,
        "page_faults_per_step": median(faults),
        "class_times_s": classes.seconds(),
        "class_calls": classes.calls(),
        "call_times_s": classes.each_s(),
    }


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def memory_of_step(step: TrainingStep, steps: int = 2) -> dict[str, Any]:
    """Measures the allocation peak of building a model and training it (optimizer states appear in the first step)."""
    from validation.allocation_peak import allocation_peak_bytes
    from validation.training import Training

    def run() -> None:
        training = Training(step)
        for _ in range(steps):
            training.step()

    return {"peak_memory_bytes": allocation_peak_bytes(run)}


def main() -> None:
    """Answers one request."""
    request = json.loads(sys.stdin.read())
    settings = Settings(**request["settings"])
    if request["core"] is not None:
        os.sched_setaffinity(0, {request["core"]})
    import torch

    torch.set_num_threads(settings.threads)
    for data in request["steps"]:
        step = TrainingStep.from_dict(data)
        answer = memory_of_step(step) if request["memory"] else time_step(step, settings)
        sys.stdout.write(json.dumps({"name": step.name} | answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
