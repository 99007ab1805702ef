"""What measuring the noise scale costs: steps under `DynamicBatch` beside plain steps of the same model, in turn.

As a script, `python -P -m validation.batch_overhead`, it is the measuring process: cases as JSON in, one JSON line each out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from simtrain.core.units import format_time
from validation.measure import ALLOCATOR_ENVIRONMENT, THREAD_ENVIRONMENT, MeasurementError, environment, quietest_core
from validation.measurement import Environment
from validation.steps import TrainingStep, gpt, image_model

EVERY = 20
"""Steps from one measurement to the next for which the overhead is told: the default of `DynamicBatch`."""
MEASURED_EVERY, ROUNDS = 4, 33

CASES = (
    gpt("gpt-square", (4, 256, 4, 4096), (4, 128), "adamw", "accumulation=2"),
    gpt("gpt-wide", (2, 512, 8, 8192), (2, 96), "adamw", "accumulation=4"),
    gpt("gpt-few-tokens", (3, 384, 6, 8192), (1, 64), "adamw", "accumulation=2"),
    gpt("gpt-deep", (12, 160, 5, 2048), (4, 96), "sgd", "accumulation=4"),
    image_model("resnet18-cifar", "resnet18-cifar", 8, "sgd-momentum", "accumulation=2"),
)


@dataclass(frozen=True, slots=True)
class Overhead:
    """One model; CPU seconds of a step, medians.

    Attributes:
        name: Of the case.
        plain_s: Without the component.
        unmeasured_s: With it, in a step that it does not measure.
        measured_s: With it, in a step that it measures.
    """

    name: str
    plain_s: float
    unmeasured_s: float
    measured_s: float

    @property
    def share(self) -> float:
        """What training takes longer with one step in `EVERY` measured."""
        return ((EVERY - 1) * self.unmeasured_s + self.measured_s) / (EVERY * self.plain_s) - 1

    @property
    def measuring_share(self) -> float:
        """The part of it that measuring makes; the rest lies within the spread of equal steps."""
        return (self.measured_s - self.unmeasured_s) / (EVERY * self.plain_s)


@dataclass(frozen=True, slots=True)
class OverheadReport:
    """All cases.

    Attributes:
        rows: One for each.
        environment: Where and when.
    """

    rows: tuple[Overhead, ...]
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        rows = [asdict(r) | {"share": r.share, "measuring_share": r.measuring_share} for r in self.rows]
        return {"command": "simtrain validate batch", "environment": asdict(self.environment), "every": EVERY, "rows": rows}

    def __str__(self) -> str:
        lines = [f"{'model':<18}{'plain':>10}{'not measured':>14}{'measured':>11}{f'1 in {EVERY}':>9}{'of it measuring':>17}"]
        for r in self.rows:
            times = f"{format_time(r.plain_s):>10}{r.unmeasured_s / r.plain_s - 1:>+14.1%}{r.measured_s / r.plain_s - 1:>+11.1%}"
            lines.append(f"{r.name:<18}{times}{r.share:>+9.2%}{r.measuring_share:>+17.2%}")
        shares = [r.share for r in self.rows]
        measuring = max(r.measuring_share for r in self.rows)
        lines.append(f"overhead median {median(shares):.2%}, worst {max(shares):.2%}; measuring alone at most {measuring:.2%}")
        return "\n".join(lines)


def measure_overhead(cases: Sequence[TrainingStep] = CASES, rounds: int = ROUNDS) -> OverheadReport:
    """Measures steps with and without the component on this machine.

    Args:
        cases: What is trained.
        rounds: Steps of each kind.

    Raises:
        MeasurementError: The measuring process failed.
        InputError: PyTorch is not installed.
    """
    here = environment()
    request = {"cases": [case.to_dict() for case in cases], "rounds": rounds, "core": quietest_core()}
    variables = os.environ | ALLOCATOR_ENVIRONMENT | dict.fromkeys(THREAD_ENVIRONMENT, "1")
    command = [sys.executable, "-P", "-m", "validation.batch_overhead"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=variables, check=False)
    if done.returncode != 0:
        raise MeasurementError(f"measuring the overhead failed: {done.stderr.strip()[-2000:]}")
    rows = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return OverheadReport(tuple(Overhead(**row) for row in rows), here)


def _measure(case: TrainingStep, rounds: int) -> Overhead:
    from simtrain.run.batch_policy import BatchPolicy
    from simtrain.torch.dynamic_batch import DynamicBatch
    from validation.training import Training

    plain, other = Training(case), Training(case)
    micro_batch, accumulation = case.parsed().micro_batch, case.parsed().accumulation
    fixed = BatchPolicy((micro_batch,), dwell_steps=10**9)
    dynamic = DynamicBatch(other.model, other.optimizer, micro_batch, accumulation=accumulation, policy=fixed, every=MEASURED_EVERY)

    def step() -> None:
        for _ in range(accumulation):
            with dynamic.micro_batch():
                dynamic.backward(other.model(*other.batch))
            dynamic.step()

    times: dict[str, list[float]] = {"plain": [], "unmeasured": [], "measured": []}
    for number in range(rounds):
        plain_s, dynamic_s = _timed(plain.step), _timed(step)
        if number >= MEASURED_EVERY:  # the first steps make optimizer states and settle the allocator
            times["plain"].append(plain_s)
            times["measured" if number % MEASURED_EVERY == MEASURED_EVERY - 1 else "unmeasured"].append(dynamic_s)
    return Overhead(case.name, median(times["plain"]), median(times["unmeasured"]), median(times["measured"]))


def _timed(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Answers one request."""
    import torch

    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    if request["core"] is not None:
        os.sched_setaffinity(0, {request["core"]})
    for case in request["cases"]:
        print(json.dumps(asdict(_measure(TrainingStep.from_dict(case), request["rounds"]))), flush=True)


if __name__ == "__main__":
    main()
