"""Predictions of the closed form against real training steps on this machine, beside a null model and the measurement's own noise.

`VARIANTS_LOOKED_AT` counts, for each fixed list, how often the form of the model was changed with its residuals in sight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from simtrain.core import catalog
from simtrain.core.hardware import Cluster, Device, Node
from simtrain.step.predict import schedule
from validation.calibrate import arithmetic
from validation.errors import ErrorSummary, skill, summarise
from validation.features import executed_flops, runtime_of, workload_of
from validation.gpu_steps import GPU_TEST_STEPS
from validation.machine_profile import MachineProfile
from validation.measure import Progress, measure
from validation.measurement import Measurement, Settings
from validation.steps import CALIBRATION_STEPS, MATCHED_STEPS, TEST_STEPS, TrainingStep, quick_test_steps

TEST_SETTINGS = Settings(warmup_steps=3, timed_steps=11, operator_steps=0, processes=3, memory=True)
GPU_TEST_SETTINGS = replace(TEST_SETTINGS, warmup_steps=5, timed_steps=15, processes=2)
DRIFT_SETTINGS = Settings(warmup_steps=2, timed_steps=7, memory=False)
DRIFT_NAMES = ("cal-square", "cal-deep", "cal-bf16-square")
"""Calibration steps that are measured again around a comparison."""
NOTABLE_DRIFT = 0.03
"""Drift beyond which a comparison asks for a new calibration: what a calibration's own steps are refitted within.

One core of a shared server was seen to take 15 % longer for the same GPTs in fp32 five hours after its calibration.
"""
QUICK_SETTINGS = Settings(warmup_steps=3, timed_steps=5, operator_steps=0, processes=1, memory=True)
VARIANTS_LOOKED_AT = {"test": 2, "matched": 2, "gpu": 0}
"""Changes of the model's form after residuals on a list had been looked at.

The first run of the test list showed checkpointed steps 5 to 7 % too fast; development steps then gave the cost of saving tensors again,
and that of every head of attention. Then, with the residuals of one run of each list in sight, attention was counted in PyTorch's
blocks, activations became classes of their own and the operator table was added; its form was chosen among 55 by leaving out one
calibration step at a time, never on these lists.
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One training step, measured and predicted.

    Attributes:
        measurement: What really happened.
        predicted_time_s: By the closed form with the machine's profile.
        predicted_memory_bytes: Peak of allocated bytes; no constant is fitted.
        null_time_s: By one FLOP/s for everything.
    """

    measurement: Measurement
    predicted_time_s: float
    predicted_memory_bytes: float
    null_time_s: float

    @property
    def time_error(self) -> float:
        """Relative, with sign."""
        return self.predicted_time_s / self.measurement.step_time_s - 1

    @property
    def memory_error(self) -> float:
        """Relative, with sign."""
        return self.predicted_memory_bytes / self.measurement.peak_memory_bytes - 1

    @property
    def null_error(self) -> float:
        """Relative, with sign."""
        return self.null_time_s / self.measurement.step_time_s - 1


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """All compared steps and their summaries.

    Attributes:
        rows: One per training step.
        profile: Constants the predictions rest on.
        drifts: By how much the machine was slower than when it was calibrated, before and after the steps (empty if not measured).
    """

    rows: tuple[Comparison, ...]
    profile: MachineProfile
    drifts: tuple[float, ...] = ()

    @property
    def variants_looked_at(self) -> int:
        """For the list that the steps come from."""
        if self.profile.on_gpu:
            return VARIANTS_LOOKED_AT["gpu"]
        return VARIANTS_LOOKED_AT["test" if any(r.measurement.step in TEST_STEPS for r in self.rows) else "matched"]

    @property
    def time(self) -> ErrorSummary:
        """Errors of step time."""
        return summarise([r.time_error for r in self.rows])

    @property
    def memory(self) -> ErrorSummary:
        """Errors of peak memory."""
        return summarise([r.memory_error for r in self.rows])

    @property
    def null(self) -> ErrorSummary:
        """Errors of the null model's step time."""
        return summarise([r.null_error for r in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "summary": {
                "time": self.time.to_dict(),
                "memory": self.memory.to_dict(),
                "null_time": self.null.to_dict(),
                "skill": skill(self.time, self.null),
                "variants_looked_at": self.variants_looked_at,
                "drifts": list(self.drifts),
            },
            "rows": [
                {
                    "predicted_time_s": r.predicted_time_s,
                    "predicted_memory_bytes": r.predicted_memory_bytes,
                    "null_time_s": r.null_time_s,
                    "time_error": r.time_error,
                    "memory_error": r.memory_error,
                    "null_error": r.null_error,
                    "measurement": r.measurement.to_dict(),
                }
                for r in self.rows
            ],
        }

    def __str__(self) -> str:
        return "\n".join([_HEADER, *(_line(r) for r in self.rows), *self._footer()])

    def _footer(self) -> list[str]:
        noise = summarise([max(r.measurement.noise, r.measurement.process_spread) for r in self.rows])
        return [
            f"step time    {self.time}",
            f"null model   {self.null}: one rate each of {self._null_rates()}; skill {skill(self.time, self.null):.2f}",
            f"peak memory  {self.memory}",
            f"noise        {noise.mean:.2%} mean, {noise.worst:.2%} worst, of the measured step times",
            f"variants of the model looked at on these steps: {self.variants_looked_at}",
            *self._drift_line(),
        ]

    def _drift_line(self) -> list[str]:
        if not self.drifts:
            return []
        shown = " before and ".join(f"{drift:+.1%}" for drift in self.drifts)
        advice = ": the machine has changed, run `simtrain calibrate`" if max(map(abs, self.drifts)) > NOTABLE_DRIFT else ""
        return [f"drift        steps of the calibration take {shown} after these, against the profile{advice}"]

    def _null_rates(self) -> str:
        return ", ".join(f"{rate / 1e9:.1f} GFLOP/s in {path}" for path, rate in self.profile.null_flops_per_s.items())


_HEADER = f"{'step':<22}{'measured':>11}{'predicted':>11}{'error':>8}{'null':>8}{'noise':>7}{'peak MiB':>10}{'predicted':>11}{'error':>9}"


def _line(row: Comparison) -> str:
    m = row.measurement
    return (
        f"{m.step.name:<22}{m.step_time_s * 1e3:>8.1f} ms{row.predicted_time_s * 1e3:>8.1f} ms{row.time_error:>+8.1%}"
        f"{row.null_error:>+8.1%}{max(m.noise, m.process_spread):>7.1%}{m.peak_memory_bytes / 2**20:>10.2f}"
        f"{row.predicted_memory_bytes / 2**20:>11.2f}{row.memory_error:>+9.3%}"
    )


def single_core(device: Device) -> Cluster:
    """Returns a machine with one rank, on the given CPU core or GPU."""
    node = Node(devices=(device,), host=None, host_link=catalog.link(device.host_link))
    return Cluster(name=device.name, nodes=(node,))


def predict(step: TrainingStep, device: Device) -> tuple[float, float]:
    """Returns predicted step time in seconds and peak allocated bytes."""
    result = schedule(workload_of(step), single_core(device), step.parsed(), runtime=runtime_of(device))
    return result.step_time_s, result.memory.allocated_bytes


def fixed_list(device: str, *, quick: bool = False, families: bool = False) -> tuple[tuple[TrainingStep, ...], Settings]:
    """Returns the fixed list of a device, and how it is measured.

    Args:
        device: "cpu" or "cuda", whose list holds all families.
        quick: A few steps, measured once.
        families: GPTs, Llamas, ResNets and ViTs rather than GPTs alone (on the processor).
    """
    if device == "cpu":
        return (quick_test_steps(), QUICK_SETTINGS) if quick else (MATCHED_STEPS if families else TEST_STEPS, TEST_SETTINGS)
    chosen = GPU_TEST_STEPS[:2] if quick else GPU_TEST_STEPS
    return chosen, replace(QUICK_SETTINGS if quick else GPU_TEST_SETTINGS, device=device)


def compare(
    profile: MachineProfile,
    steps: Sequence[TrainingStep] = TEST_STEPS,
    settings: Settings = TEST_SETTINGS,
    progress: Progress | None = None,
) -> ComparisonReport:
    """Predicts training steps, then measures them.

    Args:
        profile: This machine's constants.
        steps: Which; the fixed test list by default.
        settings: How to measure.
        progress: Told about each measured step.

    Raises:
        MeasurementError: A measuring process failed.
    """
    device = profile.device()
    predictions = [predict(step, device) for step in steps]
    before = _drift(profile, settings, progress)
    measurements = measure(steps, settings, progress)
    drifts = (*before, *_drift(profile, settings, progress))
    return replace(report(profile, measurements, predictions), drifts=drifts)


def _drift(profile: MachineProfile, settings: Settings, progress: Progress | None) -> tuple[float, ...]:
    """How much longer a few steps that the profile was fitted to take now than it says; nothing on a GPU or where steps run once."""
    steps = [s for s in CALIBRATION_STEPS if s.name in DRIFT_NAMES and s.name in profile.steps]
    if profile.on_gpu or settings.processes == 1 or not steps:
        return ()
    device = profile.device()
    return (median(m.step_time_s / predict(m.step, device)[0] - 1 for m in measure(steps, DRIFT_SETTINGS, progress)),)


def report(profile: MachineProfile, measurements: Sequence[Measurement], predictions: Sequence[tuple[float, float]]) -> ComparisonReport:
    """Puts measurements, predictions and the null model side by side."""
    rows = tuple(
        Comparison(m, time_s, memory_bytes, executed_flops(m.step) / profile.null_flops_per_s[arithmetic(m.step)])
        for m, (time_s, memory_bytes) in zip(measurements, predictions, strict=True)
    )
    return ComparisonReport(rows, profile)
