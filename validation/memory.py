"""Matched pairs of recomputation: peak memory, time and gradients of real steps beside what is predicted for them.

Every rule and two optimal choices are carried out by `simtrain.torch.apply` on real models; PyTorch's budgeted partitioner runs beside
them where it works. Nothing is fitted to these runs; times rest on the machine's calibration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from simtrain.step.predict import schedule
from simtrain.step.remat_choice import Question
from simtrain.step.setting import resolve
from validation.compare import single_core
from validation.errors import summarise
from validation.features import runtime_of, workload_of
from validation.gpu_steps import GPU_MEMORY_STEPS
from validation.machine_profile import MachineProfile
from validation.measure import MeasurementError, Progress, environment, quietest_core, worker_environment
from validation.measurement import Environment
from validation.memory_worker import PARTITIONER
from validation.steps import TrainingStep, gpt, image_model

MEMORY_STEPS = (
    gpt("gpt-small-head", (8, 200, 4, 1600), (4, 116), "sgd"),
    gpt("gpt-deep", (16, 136, 4, 1280), (4, 124), "adamw"),
    gpt("gpt-logits", (4, 168, 4, 14000), (4, 108), "sgd"),
    image_model("resnet50-64", "resnet50", 4, "sgd", image_size=64, classes=10, recomputable=True),
    image_model("vit", "vit", 4, "sgd", layers=9, hidden=192, heads=4, patch=8, image_size=80, classes=10),
)
"""Written before anything was measured; no constant rests on them."""

RULES = ("none", "every:2", "sqrt", "full")
BUDGETS = (0.3, 0.7)
"""Budgets of the optimal choices: where between the least that any choice takes and what no recomputation takes."""

PARTITIONERS = (0.5,)
"""Budgets of PyTorch's partitioner, as shares of what is saved without it."""
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One way to recompute one model.

    Attributes:
        step: Name of the training step.
        name: Rule, `optimal 30 %`, or `partitioner:0.3`.
        checkpoint: As a strategy says it ("" for the partitioner).
        peak_bytes: Measured.
        predicted_bytes: Predicted; 0 for the partitioner.
        step_time_s: Measured.
        predicted_time_s: Predicted; 0 for the partitioner.
        noise: Interquartile range of the measured time over its median.
        gradient_difference: Largest difference of a gradient from that without recomputation, over the largest entry of its tensor.
        error: Why it did not run ("" if it did).
    """

    step: str
    name: str
    checkpoint: str
    peak_bytes: float = 0.0
    predicted_bytes: float = 0.0
    step_time_s: float = 0.0
    predicted_time_s: float = 0.0
    noise: float = 0.0
    gradient_difference: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """All rows, where they were measured, and the training steps that they recompute."""

    rows: tuple[MemoryRow, ...]
    environment: Environment
    steps: tuple[TrainingStep, ...] = MEMORY_STEPS

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "command": "simtrain validate memory",
            "environment": asdict(self.environment),
            "steps": [s.to_dict() for s in self.steps],
            "rounds": ROUNDS,
            "summary": {name: summarise(errors).to_dict() for name, errors in self._errors().items()},
            "rows": [asdict(row) for row in self.rows],
        }

    def _errors(self) -> dict[str, list[float]]:
        """Relative errors of peaks, of step times, and of how much longer a step takes than without recomputation."""
        ran = [r for r in self.rows if r.predicted_bytes and not r.error]
        plain = {r.step: r for r in ran if r.name == "none"}
        slower = [
            (r.predicted_time_s / plain[r.step].predicted_time_s) / (r.step_time_s / plain[r.step].step_time_s) - 1
            for r in ran
            if r.checkpoint != "none" and r.step in plain
        ]
        return {
            "peak memory": [r.predicted_bytes / r.peak_bytes - 1 for r in ran],
            "step time": [r.predicted_time_s / r.step_time_s - 1 for r in ran],
            "slowdown": slower,
        }

    def __str__(self) -> str:
        head = f"{'step':<16}{'recomputed':<22}{'peak MiB':>9}{'predicted':>11}{'error':>9}"
        lines = [f"{head}{'ms':>9}{'predicted':>11}{'error':>8}{'gradients':>11}"]
        for r in self.rows:
            if r.error:
                lines.append(f"{r.step:<16}{r.name:<22}did not run: {r.error}")
                continue
            same = "equal" if not r.gradient_difference else f"{r.gradient_difference:.0e}"
            text = f"{r.step:<16}{r.name:<22}{r.peak_bytes / 2**20:>9.2f}"
            predicted = f"{'':>20}{r.step_time_s * 1e3:>9.1f}{'':>19}"
            if r.predicted_bytes:
                predicted = (
                    f"{r.predicted_bytes / 2**20:>11.2f}{r.predicted_bytes / r.peak_bytes - 1:>+9.2%}"
                    f"{r.step_time_s * 1e3:>9.1f}{r.predicted_time_s * 1e3:>11.1f}{r.predicted_time_s / r.step_time_s - 1:>+8.1%}"
                )
            lines.append(f"{text}{predicted}{same:>11}")
        return "\n".join([*lines, *(f"{name:<12} {summarise(errors)}" for name, errors in self._errors().items())])


def compare_memory(profile: MachineProfile, steps: Sequence[TrainingStep] | None = None, progress: Progress | None = None) -> MemoryReport:
    """Predicts, then measures every way to recompute every model.

    Args:
        profile: This machine's constants, of its core or of its GPU.
        steps: Which; the device's fixed list by default.
        progress: Told about each model.

    Raises:
        MeasurementError: A measuring process failed.
    """
    device = "cuda" if profile.on_gpu else "cpu"
    here, rows = environment(device), []
    chosen = tuple(steps or (GPU_MEMORY_STEPS if profile.on_gpu else MEMORY_STEPS))
    for step in chosen:
        predicted = _predicted(step, profile)
        names = {row.checkpoint or row.name: row for row in predicted}  # an optimal choice may be a rule
        answers = _measured(step, list(names), device)
        for way, row in names.items():
            answer = answers[way]
            rows.append(_joined(row, answer))
        if progress:
            progress(f"{step.name}: {len(names)} ways")
    return MemoryReport(tuple(rows), here, chosen)


def _joined(row: MemoryRow, answer: dict[str, Any]) -> MemoryRow:
    return MemoryRow(**(asdict(row) | {k: v for k, v in answer.items() if k != "way"}))


def _predicted(step: TrainingStep, profile: MachineProfile) -> list[MemoryRow]:
    device, strategy, work = profile.device(), step.parsed(), workload_of(step)
    core, runtime = single_core(device), runtime_of(device)
    question = Question.of(resolve(work, core, strategy.with_(checkpoint="optimal"), runtime))
    most = question.counted_bytes("none")
    least = question.counted_bytes(question.text(question.smallest().spans))
    ways = {rule: rule for rule in RULES}
    for share in BUDGETS:
        plan = question.within(question.device_bytes(least + share * (most - least)))
        if plan is not None:
            ways[f"optimal {share:.0%}"] = question.text(plan.spans)
    rows = []
    for name, checkpoint in ways.items():
        result = schedule(work, core, strategy.with_(checkpoint=checkpoint), runtime=runtime)
        rows.append(
            MemoryRow(step.name, name, checkpoint, predicted_bytes=result.memory.allocated_bytes, predicted_time_s=result.step_time_s)
        )
    return rows + [MemoryRow(step.name, f"{PARTITIONER}{share}", "") for share in PARTITIONERS]


def _measured(step: TrainingStep, ways: list[str], device: str) -> dict[str, dict[str, Any]]:
    core = quietest_core() if device == "cpu" else None
    request = {"step": step.to_dict(), "ways": ways, "rounds": ROUNDS, "core": core, "device": device}
    variables = os.environ | (worker_environment() if device == "cpu" else {})
    command = [sys.executable, "-P", "-m", "validation.memory_worker"]
    process = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=variables, check=False)
    if process.returncode != 0:
        raise MeasurementError(f"measuring {step.name} failed: {process.stderr.strip()[-2000:]}")
    answers = (json.loads(line) for line in process.stdout.splitlines() if line.startswith("{"))
    return {answer["way"]: answer for answer in answers}
