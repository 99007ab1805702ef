"""Predictions of the closed form against real training steps on this machine, beside a null model and the measurement's own noise.

A machine's speed drifts between its calibration and the measured steps. Errors are of times at the speed of the calibration, found by the
reference workload beside every step (`validation.reference`); those of the raw times stand beside them. Nothing is fitted to these steps.

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
from validation.reference import REPETITIONS
from validation.steps import CALIBRATION_STEPS, MATCHED_STEPS, TEST_STEPS, TrainingStep, quick_test_steps

TEST_SETTINGS = Settings(warmup_steps=3, timed_steps=11, operator_steps=0, processes=3, memory=True, reference_repetitions=REPETITIONS)
GPU_TEST_SETTINGS = replace(TEST_SETTINGS, warmup_steps=5, timed_steps=15, processes=2, reference_repetitions=0)
DRIFT_SETTINGS = Settings(warmup_steps=2, timed_steps=7, memory=False, reference_repetitions=REPETITIONS)
DRIFT_NAMES = ("cal-square", "cal-deep", "cal-bf16-square")
"""Calibration steps that are measured again around a comparison."""
NOTABLE_DRIFT = 0.03
"""Drift beyond which a comparison asks for a new calibration: what a calibration's own steps are refitted within.

One core of a shared server was seen to take 15 % longer for the same GPTs in fp32 five hours after its calibration.
"""
QUICK_SETTINGS = Settings(warmup_steps=3, timed_steps=5, operator_steps=0, processes=1, memory=True, reference_repetitions=REPETITIONS)
VARIANTS_LOOKED_AT = {"test": 2, "matched": 2, "gpu": 0}
"""Changes of the model's form after residuals on a list had been looked at.

The first run of the test list showed checkpointed steps 5 to 7 % too fast; development steps then gave the cost of saving tensors again,
and that of every head of attention. Then, with the residuals of one run of each list in sight, attention was counted in PyTorch's
blocks, activations became classes of their own and the operator table was added; its form was chosen among 55 by leaving out one
calibration step at a time, never on these lists. That measured times are put at the speed of the calibration came after raw errors on the
matched list had been seen, too; it changes no prediction and has no constant to fit, and the raw errors are still told.
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One training step, measured and predicted.

    Attributes:
        measurement: What really happened, as the clock showed it.
        predicted_time_s: By the closed form with the machine's profile.
        predicted_memory_bytes: Peak of allocated bytes; no constant is fitted.
        null_time_s: By one FLOP/s for everything.
        reference_time_s: Of the reference workload when the machine was calibrated (0 without one).
    """

    measurement: Measurement
    predicted_time_s: float
    predicted_memory_bytes: float
    null_time_s: float
    reference_time_s: float = 0.0

    @property
    def normalized(self) -> Measurement:
        """The measurement at the speed of the calibration; as it is where no reference was timed, then or now."""
        return self.measurement.at_reference(self.reference_time_s)

    @property
    def speed(self) -> float | None:
        """How fast the machine was beside this step, 1 as in its calibration; `None` where no reference was timed, then or now."""
        known = self.reference_time_s and self.measurement.reference_times_s
        return self.normalized.step_time_s / self.measurement.step_time_s if known else None

    @property
    def time_error(self) -> float:
        """Relative, with sign; of the time at the speed of the calibration."""
        return self.predicted_time_s / self.normalized.step_time_s - 1

    @property
    def raw_time_error(self) -> float:
        """Relative, with sign; of the time that the clock showed."""
        return self.predicted_time_s / self.measurement.step_time_s - 1

    @property
    def noise(self) -> float:
        """Of the measured time: within a process or between processes at the speed of the calibration, whichever is larger."""
        return max(self.measurement.noise, self.normalized.process_spread)

    @property
    def memory_error(self) -> float:
        """Relative, with sign."""
        return self.predicted_memory_bytes / self.measurement.peak_memory_bytes - 1

    @property
    def null_error(self) -> float:
        """Relative, with sign; of the time at the speed of the calibration."""
        return self.null_time_s / self.normalized.step_time_s - 1


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """All compared steps and their summaries.

    Attributes:
        rows: One per training step.
        profile: Constants the predictions rest on.
        drifts: By how much steps of the calibration took longer than by the profile, before and after these steps (empty if not measured);
            at the speed of the calibration where the reference tells it.
        raw_drifts: The same of the times that the clock showed.
    """

    rows: tuple[Comparison, ...]
    profile: MachineProfile
    drifts: tuple[float, ...] = ()
    raw_drifts: tuple[float, ...] = ()

    @property
    def variants_looked_at(self) -> int:
        """For the list that the steps come from."""
        if self.profile.on_gpu:
            return VARIANTS_LOOKED_AT["gpu"]
        return VARIANTS_LOOKED_AT["test" if any(r.measurement.step in TEST_STEPS for r in self.rows) else "matched"]

    @property
    def time(self) -> ErrorSummary:
        """Errors of step time at the speed of the calibration."""
        return summarise([r.time_error for r in self.rows])

    @property
    def raw_time(self) -> ErrorSummary:
        """Errors of step time as the clock showed it."""
        return summarise([r.raw_time_error for r in self.rows])

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
                "raw_time": self.raw_time.to_dict(),
                "memory": self.memory.to_dict(),
                "null_time": self.null.to_dict(),
                "skill": skill(self.time, self.null),
                "variants_looked_at": self.variants_looked_at,
                "drifts": list(self.drifts),
                "raw_drifts": list(self.raw_drifts),
            },
            "rows": [
                {
                    "predicted_time_s": r.predicted_time_s,
                    "predicted_memory_bytes": r.predicted_memory_bytes,
                    "null_time_s": r.null_time_s,
                    "normalized_time_s": r.normalized.step_time_s,
                    "speed": r.speed,
                    "time_error": r.time_error,
                    "raw_time_error": r.raw_time_error,
                    "memory_error": r.memory_error,
                    "null_error": r.null_error,
                    "normalized_process_spread": r.normalized.process_spread,
                    "measurement": r.measurement.to_dict(),
                }
                for r in self.rows
            ],
        }

    def __str__(self) -> str:
        return "\n".join([_HEADER, *(_line(r) for r in self.rows), *self._footer()])

    def _footer(self) -> list[str]:
        noise = summarise([r.noise for r in self.rows])
        return [
            f"step time    {self.time}",
            *self._reference_lines(),
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
        raw = " and ".join(f"{drift:+.1%}" for drift in self.raw_drifts)
        beside = f" (by the clock {raw})" if self.raw_drifts != self.drifts else ""
        advice = ": the machine has changed, run `simtrain calibrate`" if max(map(abs, self.drifts)) > NOTABLE_DRIFT else ""
        return [f"drift        steps of the calibration take {shown} after these, against the profile{beside}{advice}"]

    def _reference_lines(self) -> list[str]:
        speeds = [r.speed for r in self.rows if r.speed is not None]
        if not speeds:
            return [f"             of raw times: no reference workload tells the machine's speed, {self._why_no_reference()}"]
        return [
            f"  raw times  {self.raw_time}",
            f"reference    a small GPT and a small ResNet, {self.profile.reference_time_s * 1e3:.1f} ms in the calibration, timed before "
            "and after each step in its process;",
            "             errors are of measured time x reference then / reference beside; nothing of it is fitted to these steps;",
            f"             the machine ran at {min(speeds):.0%} to {max(speeds):.0%} of the speed that it had when calibrated",
        ]

    def _why_no_reference(self) -> str:
        if self.profile.on_gpu:
            return "a GPU has none"
        if not self.profile.known_reference_s:
            return "the profile has none, or another (full runs of `simtrain calibrate` time it)"
        return "it was not timed"

    def _null_rates(self) -> str:
        return ", ".join(f"{rate / 1e9:.1f} GFLOP/s in {path}" for path, rate in self.profile.null_flops_per_s.items())


_HEADER = (
    f"{'step':<22}{'raw':>11}{'speed':>8}{'measured':>11}{'predicted':>11}{'error':>8}{'null':>8}{'noise':>7}"
    f"{'peak MiB':>10}{'predicted':>11}{'error':>9}"
)


def _line(row: Comparison) -> str:
    m, speed = row.measurement, "-" if row.speed is None else f"{row.speed:.1%}"
    return (
        f"{m.step.name:<22}{m.step_time_s * 1e3:>8.1f} ms{speed:>8}{row.normalized.step_time_s * 1e3:>8.1f} ms"
        f"{row.predicted_time_s * 1e3:>8.1f} ms{row.time_error:>+8.1%}{row.null_error:>+8.1%}{row.noise:>7.1%}"
        f"{m.peak_memory_bytes / 2**20:>10.2f}{row.predicted_memory_bytes / 2**20:>11.2f}{row.memory_error:>+9.3%}"
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
    measurements = measure(steps, _with_reference(profile, settings), progress)
    drifts = [*before, *_drift(profile, settings, progress)]
    found = report(profile, measurements, predictions)
    return replace(found, drifts=tuple(at_speed for at_speed, _ in drifts), raw_drifts=tuple(raw for _, raw in drifts))


def _with_reference(profile: MachineProfile, settings: Settings) -> Settings:
    """Leaves the reference workload out where the profile has none to compare with."""
    return settings if profile.known_reference_s else replace(settings, reference_repetitions=0)


def _drift(profile: MachineProfile, settings: Settings, progress: Progress | None) -> list[tuple[float, float]]:
    """How much longer a few steps that the profile was fitted to take now than it says; nothing on a GPU or where steps run once.

    At the speed of the calibration, then by the clock.
    """
    steps = [s for s in CALIBRATION_STEPS if s.name in DRIFT_NAMES and s.name in profile.steps]
    if profile.on_gpu or settings.processes == 1 or not steps:
        return []
    device = profile.device()
    raw = measure(steps, _with_reference(profile, DRIFT_SETTINGS), progress)
    at_speed = [m.at_reference(profile.known_reference_s) for m in raw]

    def slower(measurements: Sequence[Measurement]) -> float:
        return median(m.step_time_s / predict(m.step, device)[0] - 1 for m in measurements)

    return [(slower(at_speed), slower(raw))]


def report(profile: MachineProfile, measurements: Sequence[Measurement], predictions: Sequence[tuple[float, float]]) -> ComparisonReport:
    """Puts measurements, predictions and the null model side by side."""
    rows = tuple(
        Comparison(
            measurement=m,
            predicted_time_s=time_s,
            predicted_memory_bytes=memory_bytes,
            null_time_s=executed_flops(m.step) / profile.null_flops_per_s[arithmetic(m.step)],
            reference_time_s=profile.known_reference_s,
        )
        for m, (time_s, memory_bytes) in zip(measurements, predictions, strict=True)
    )
    return ComparisonReport(rows, profile)
