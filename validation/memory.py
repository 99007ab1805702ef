"""Matched pairs of recomputation: peak memory, time and gradients of real steps beside what is predicted for them.

Every rule and several optimal choices are carried out by `simtrain.torch.apply` on real models; PyTorch's budgeted partitioner runs beside
them where it works. Optimal choices are also made for the peaks of the square-root rule, of full recomputation and of the partitioner, so
that times compare at equal memory (the partitioner's traced operators are slower by themselves, so that it also compares with its own time
at full budget), and for a quarter less memory than no recomputation takes, the gain that the project set out to reach.
Blocks with tensorized weights stand beside them. Nothing is fitted to these runs; times rest on the machine's calibration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from simtrain.core.errors import InputError
from simtrain.core.runtimes import runtime as find_runtime
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
from validation.memory_worker import PARTITIONER, TENSORIZE
from validation.steps import TrainingStep, gpt, image_model

MEMORY_STEPS = (
    gpt("gpt-small-head", (8, 200, 4, 1600), (4, 116), "sgd"),
    gpt("gpt-deep", (16, 136, 4, 1280), (4, 124), "adamw"),
    gpt("gpt-logits", (4, 168, 4, 14000), (4, 108), "sgd"),
    image_model("resnet50-64", "resnet50", 4, "sgd", image_size=64, classes=10, recomputable=True),
    image_model("vit", "vit", 4, "sgd", layers=9, hidden=192, heads=4, patch=8, image_size=80, classes=10),
    image_model("resnet18-112", "resnet18", 4, "sgd-momentum", image_size=112, classes=100, recomputable=True),
    replace(gpt("gpt-scores", (8, 176, 8, 1400), (2, 280), "sgd"), attention="unfused"),
)
"""Written before anything was measured (the last two later, before their own measurements); no constant rests on them."""

RULES = ("none", "every:2", "sqrt", "full")
SELECTIVE = "selective"
"""Beside them where attention writes its scores."""
BUDGETS = (0.3, 0.7)
"""Budgets of the optimal choices: where between the least that any choice takes and what no recomputation takes."""

PARTITIONERS = (0.5,)
"""Budgets of PyTorch's partitioner, as shares of what is saved without it."""

WHOLE = f"{PARTITIONER}1.0"
"""The partitioner with nothing to save: what its traced operators take. Measured in a process of its own, beside no recomputation."""

RIVALS = ("sqrt", "full", SELECTIVE, *(f"{PARTITIONER}{share}" for share in PARTITIONERS))
"""At whose peaks the optimal choice is measured too, where they are measured."""

LESS = 0.25
"""Share of the memory that recomputation is asked to save."""

TENSORIZED = {
    "gpt-small-head": ("low-rank:compression=4", "tensor-train:rank=4", "tensor-train:compression=4"),
    "resnet50-64": ("tucker:compression=4",),
    "vit": ("low-rank:compression=4", "tensor-train:compression=4"),
}
"""Forms of the weights that are measured beside whole ones."""
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
        tensorize: Form of the blocks' weights ("" where they are whole); gradients are then those of another model.
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
    tensorize: str = ""

    @property
    def way(self) -> str:
        """What the measuring process is asked for."""
        return f"{TENSORIZE}{self.tensorize}" if self.tensorize else self.checkpoint or self.name


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What was measured.

    Attributes:
        rows: All ways of all models.
        environments: Where and when: one for each call of the command, in their order.
        steps: The training steps that are recomputed.
    """

    rows: tuple[MemoryRow, ...]
    environments: tuple[Environment, ...]
    steps: tuple[TrainingStep, ...] = MEMORY_STEPS

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "command": "simtrain validate memory",
            "environments": [asdict(e) for e in self.environments],
            "steps": [s.to_dict() for s in self.steps],
            "rounds": ROUNDS,
            "summary": {name: summarise(errors).to_dict() for name, errors in self._errors().items()},
            "equal_peak": self._matched(),
            "rows": [asdict(row) for row in self.rows],
        }

    def _matched(self) -> list[dict[str, Any]]:
        """The optimal choice beside each rival at its peak, and beside no recomputation: peak and time over the other's."""
        found = []
        by_name = {(r.step, r.name): r for r in self.rows if not r.error}
        for (step, name), ours in by_name.items():
            rival = by_name.get((step, name.removeprefix(AT).removesuffix("'s peak"))) if name.startswith(AT) else None
            rival = by_name.get((step, "none")) if name == _LESS_NAME else rival
            if rival is not None:
                memory, time = ours.peak_bytes / rival.peak_bytes, ours.step_time_s / rival.step_time_s
                found.append({"step": step, "rival": rival.name, "peak": memory, "time": time})
                plain, whole = by_name.get((step, "none")), by_name.get((step, WHOLE))
                if plain and whole and rival.name.startswith(PARTITIONER):
                    found[-1]["time_over_own"] = time * whole.step_time_s / plain.step_time_s
        return found

    def _errors(self) -> dict[str, list[float]]:
        """Relative errors of peaks, of step times, and of how much longer a step takes than without recomputation."""
        ran = list({(r.step, r.way): r for r in reversed(self.rows) if r.predicted_bytes and not r.error}.values())
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
        head = f"{'step':<16}{'recomputed':<33}{'peak MiB':>9}{'predicted':>11}{'error':>9}"
        lines = [f"{head}{'ms':>9}{'predicted':>11}{'error':>8}{'gradients':>11}"]
        for r in self.rows:
            if r.error:
                lines.append(f"{r.step:<16}{r.name:<33}did not run: {r.error}")
                continue
            same = "" if r.tensorize else "equal" if not r.gradient_difference else f"{r.gradient_difference:.0e}"
            text = f"{r.step:<16}{r.name:<33}{r.peak_bytes / 2**20:>9.2f}"
            predicted = f"{'':>20}{r.step_time_s * 1e3:>9.1f}{'':>19}"
            if r.predicted_bytes:
                predicted = (
                    f"{r.predicted_bytes / 2**20:>11.2f}{r.predicted_bytes / r.peak_bytes - 1:>+9.2%}"
                    f"{r.step_time_s * 1e3:>9.1f}{r.predicted_time_s * 1e3:>11.1f}{r.predicted_time_s / r.step_time_s - 1:>+8.1%}"
                )
            lines.append(f"{text}{predicted}{same:>11}")
        lines += [f"{name:<12} {summarise(errors)}" for name, errors in self._errors().items()]
        matched = (
            f"{m['step']:<16}optimal / {m['rival']:<16} peak {m['peak']:.3f}  time {m.get('time_over_own', m['time']):.3f}"
            + (f" (each over its own step without recomputation; {m['time']:.3f} as it is)" if "time_over_own" in m else "")
            for m in self._matched()
        )
        return "\n".join([*lines, "at equal peak, and a quarter below no recomputation, measured over measured:", *matched])


def read_memory(path: Path) -> MemoryReport:
    """Reads a saved report.

    Raises:
        InputError: There is no such file, or it holds something else.
    """
    try:
        data = json.loads(path.read_text())
        steps = tuple(TrainingStep.from_dict(step) for step in data["steps"])
        places = tuple(Environment(**e) for e in data["environments"])
        return MemoryReport(tuple(MemoryRow(**row) for row in data["rows"]), places, steps)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no saved comparison of simtrain validate memory: {error}") from None


def joined(reports: Sequence[MemoryReport]) -> MemoryReport:
    """Puts reports of different models together.

    Raises:
        InputError: Reports of the same model, or from different machines.
    """
    steps = tuple(step for report in reports for step in report.steps)
    places = tuple(e for report in reports for e in report.environments)
    if twice := sorted({s.name for s in steps if sum(s.name == other.name for other in steps) > 1}):
        raise InputError(f"several of the saved comparisons are of {', '.join(twice)}: give one of each model")
    if len({(e.cpu_model, e.torch_version) for e in places}) > 1:
        raise InputError("the saved comparisons are from different machines or versions of PyTorch: show them one by one")
    return MemoryReport(tuple(row for report in reports for row in report.rows), places, steps)


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
        partitioned = _measured(step, [f"{PARTITIONER}{share}" for share in PARTITIONERS], 0, device)
        predicted = _predicted(step, profile, {way: answer["peak_bytes"] for way, answer in partitioned.items() if "peak_bytes" in answer})
        ways = list(dict.fromkeys(row.way for row in predicted if not row.error))  # an optimal choice may be a rule
        answers = _measured(step, ways, ROUNDS, device)
        rows += [row if row.error else _joined(row, answers[row.way]) for row in predicted]
        rows.append(_whole(step, answers["none"]["step_time_s"], _measured(step, ["none", WHOLE], ROUNDS, device)))
        if progress:
            progress(f"{step.name}: {len(ways)} ways")
    return MemoryReport(tuple(rows), (here,), chosen)


def _whole(step: TrainingStep, plain_s: float, answers: dict[str, dict[str, Any]]) -> MemoryRow:
    """The partitioner at full budget, its time as if no recomputation had taken as long in its process as beside the other ways."""
    answer = answers[WHOLE]
    if "error" in answer:
        return MemoryRow(step.name, WHOLE, "", error=answer["error"])
    time_s = answer["step_time_s"] * plain_s / answers["none"]["step_time_s"]
    return _joined(MemoryRow(step.name, WHOLE, ""), answer | {"step_time_s": time_s})


def _joined(row: MemoryRow, answer: dict[str, Any]) -> MemoryRow:
    return MemoryRow(**(asdict(row) | {k: v for k, v in answer.items() if k != "way"}))


AT, _LESS_NAME = "optimal at ", f"optimal, {LESS:.0%} less"


def _predicted(step: TrainingStep, profile: MachineProfile, partitioned: dict[str, float]) -> list[MemoryRow]:
    device, strategy, work = profile.device(), step.parsed(), workload_of(step)
    core, runtime = single_core(device), find_runtime(runtime_of(device)).with_(fused_attention=step.attention == "fused")
    rules = RULES if step.attention == "fused" else (*RULES, SELECTIVE)
    question = Question.of(resolve(work, core, strategy.with_(checkpoint="optimal"), runtime))
    most = question.counted_bytes("none")
    least = question.counted_bytes(question.text(question.smallest().spans))
    budgets = {f"optimal {share:.0%}": least + share * (most - least) for share in BUDGETS}
    peaks = {rule: question.counted_bytes(rule) for rule in rules} | partitioned
    budgets |= {f"{AT}{rival}'s peak": peaks[rival] for rival in RIVALS if rival in peaks}
    budgets[_LESS_NAME] = (1 - LESS) * most
    ways, rows = {rule: strategy.with_(checkpoint=rule) for rule in rules}, []
    for name, budget in budgets.items():
        plan = question.within(question.device_bytes(budget))
        if plan is not None:
            ways[name] = strategy.with_(checkpoint=question.text(plan.spans))
        else:
            why = f"not reached, the smallest choice takes {least / most:.1%} of no recomputation"
            rows.append(MemoryRow(step.name, name, "", error=why))
    for form in TENSORIZED.get(step.name, ()):
        ways[f"tensorize {form}"] = strategy.with_(tensorize=form, checkpoint="none")
    for name, how in ways.items():
        result = schedule(work, core, how, runtime=runtime)
        form = "" if how.tensorize == "none" else how.tensorize
        memory, time_s = result.memory.allocated_bytes, result.step_time_s
        rows.append(MemoryRow(step.name, name, how.checkpoint, predicted_bytes=memory, predicted_time_s=time_s, tensorize=form))
    return rows + [MemoryRow(step.name, f"{PARTITIONER}{share}", "") for share in PARTITIONERS]


def _measured(step: TrainingStep, ways: list[str], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    core = quietest_core() if device == "cpu" else None
    request = {"step": step.to_dict(), "ways": ways, "rounds": rounds, "core": core, "device": device}
    variables = os.environ | (worker_environment() if device == "cpu" else {})
    command = [sys.executable, "-P", "-m", "validation.memory_worker"]
    process = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=variables, check=False)
    if process.returncode != 0:
        raise MeasurementError(f"measuring {step.name} failed: {process.stderr.strip()[-2000:]}")
    answers = (json.loads(line) for line in process.stdout.splitlines() if line.startswith("{"))
    return {answer["way"]: answer for answer in answers}
