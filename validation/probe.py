"""Probe twenty steps, then plan: a few real steps of the user's own model, folded into the machine's profile.

Where the profile has a reference workload, it is timed beside the probed steps, and their times are put at the speed of the calibration.
The operators of the probed steps enter the operator table, where they outweigh those of the calibration. The steps that were probed are
fitted afterwards; another batch size, timed but not fitted, says what the fit is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hardware_models.cpu import CLASSES, class_constants
from hardware_models.measured import factor_name
from hardware_models.operator_table import label
from simtrain.core import catalog
from simtrain.core.errors import InputError, UnsupportedError
from simtrain.core.hardware import Device
from simtrain.core.precision import DType, precision
from simtrain.core.workload import Workload
from simtrain.step.predict import schedule
from validation.calibrate import OPTIMIZER, arithmetic
from validation.calibrate_gpu import Factor, gpu_formula, path_of
from validation.compare import single_core
from validation.features import runtime_of
from validation.fit import ClassCost
from validation.machine_profile import MachineProfile
from validation.measure import Progress, measure
from validation.measurement import Measurement, Settings
from validation.operator_table import CPU_FORMULA, Cost, Formula, entries, merged, operators_of, update_of
from validation.reference import REPETITIONS
from validation.steps import TrainingStep

PROBE_SETTINGS = Settings(warmup_steps=3, timed_steps=13, operator_steps=4, processes=1, memory=False)
"""Twenty steps."""
HELD_OUT_SETTINGS = replace(PROBE_SETTINGS, operator_steps=0)
PROBE_WEIGHT = 10
"""Entries of the calibration, at no distance, that one operator of the probed model counts as."""


@dataclass(frozen=True, slots=True)
class ProbedSize:
    """One size of the user's model.

    Attributes:
        batch: Samples.
        measured_s: Step time, median of process CPU time, at the speed of the calibration where a reference tells it.
        noise: Interquartile range over the median.
        before_s: Predicted by the profile without the probe.
        after_s: Predicted with it.
        fitted: Whether its operators are in the table.
    """

    batch: int
    measured_s: float
    noise: float
    before_s: float
    after_s: float
    fitted: bool

    def __str__(self) -> str:
        before, after = self.before_s / self.measured_s - 1, self.after_s / self.measured_s - 1
        kind = "fitted" if self.fitted else "held out"
        times = f"{self.measured_s * 1e3:>8.1f} ms{self.noise:>7.1%}"
        return f"{self.batch:>6}{times}{before:>+10.1%}{after:>+10.1%}  {kind}"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a probe found.

    Attributes:
        name: Of the workload.
        strategy: As given.
        sizes: The probed one, then the one held out.
        covered: Share of the measured step time in operators that entered the table.
        profile: With the probed operators.
        speed: Of the machine beside the probed steps, 1 as in its calibration; `None` without a reference.
    """

    name: str
    strategy: str
    sizes: tuple[ProbedSize, ...]
    covered: float
    profile: MachineProfile
    speed: float | None = None

    def __str__(self) -> str:
        head = f"{' batch':>6}{'measured':>11}{'noise':>7}{'before':>10}{'after':>10}"
        covered = f"{self.covered:.0%} of the probed step is in operators that entered the table"
        speed = [] if self.speed is None else [f"times are at the speed of the calibration; the machine now runs at {self.speed:.1%} of it"]
        return "\n".join([f"{self.name}, {self.strategy}", head, *map(str, self.sizes), covered, *speed])


def probe(
    profile: MachineProfile, name: str, strategy: str, *, sequence: int | None = None, progress: Progress | None = None
) -> ProbeReport:
    """Times twenty steps of a model, and of it at another batch, and folds the former into a profile.

    Args:
        profile: Of this machine.
        name: A catalog name or `capture:FILE.py:FUNCTION`.
        strategy: Micro-batch, optimizer, precision.
        sequence: Sequence length; the workload's own by default.
        progress: Told about each measured size.

    Raises:
        UnsupportedError: The strategy checkpoints, accumulates or shards: the steps that are probed are plain ones.
        InputError: Nothing of the model could be told apart operator by operator.
        MeasurementError: The measuring process failed.
    """
    work = catalog.workload(name, seq_len=sequence)
    step = probed_step(name, strategy, work)
    other = replace(step, name="held out", strategy=str(_at_another_batch(step)))
    measured, speed = _measured(profile, step, PROBE_SETTINGS, progress)
    held_out, _ = _measured(profile, other, HELD_OUT_SETTINGS, progress)
    folded, covered = fold(profile, work, measured)
    sizes = tuple(_size(m, work, profile, folded, fitted=m is measured) for m in (measured, held_out))
    return ProbeReport(name, strategy, sizes, covered, folded, speed)


def _measured(
    profile: MachineProfile, step: TrainingStep, settings: Settings, progress: Progress | None
) -> tuple[Measurement, float | None]:
    """Returns a measurement at the speed of the calibration, and the machine's speed beside it where a reference tells it."""
    device, repetitions = "cuda" if profile.on_gpu else "cpu", REPETITIONS if profile.known_reference_s else 0
    raw = measure((step,), replace(settings, device=device, reference_repetitions=repetitions), progress)[0]
    if not raw.reference_times_s:
        return raw, None
    measured = raw.at_reference(profile.known_reference_s)
    return measured, measured.step_time_s / raw.step_time_s


def probed_step(name: str, strategy: str, work: Workload) -> TrainingStep:
    """Returns the training step that a probe runs.

    Raises:
        UnsupportedError: It is no plain step.
    """
    step = TrainingStep("probed", name, work.sequence if work.sample_unit == "sequence" else 0, strategy)
    plan = step.parsed()
    if plan.checkpoint != "none" or plan.accumulation != 1 or plan.ranks != 1:
        raise UnsupportedError(
            f"a probe runs plain steps on one device: leave checkpointing, accumulation and sharding out of {strategy!r}; "
            "predictions that use them take the probed operators all the same"
        )
    return step


def _at_another_batch(step: TrainingStep) -> object:
    plan = step.parsed()
    return replace(plan, micro_batch=plan.micro_batch // 2 if plan.micro_batch >= 4 else 2 * plan.micro_batch)


def fold(profile: MachineProfile, work: Workload, measured: Measurement) -> tuple[MachineProfile, float]:
    """Returns a profile whose operator table holds a measured step, and the share of the step's time that entered.

    Raises:
        InputError: No class of operators could be paired with the measured calls.
    """
    path = arithmetic(measured.step)
    bare, plan = replace(profile, operator_table={}).device(), measured.step.parsed()
    formula, costs, outside_s = _gpu_costs(profile, measured) if profile.on_gpu else _cpu_costs(profile, bare, path)
    where = runtime_of(bare)
    operators = operators_of(work, plan, where, formula) | {OPTIMIZER: update_of(work, plan, where, formula)}
    table = entries(operators, measured.call_times_s, costs, outside_s, measured.class_times_s)
    if not table:
        raise InputError("none of the model's operators could be paired with the calls that PyTorch makes: there is nothing to fold in")
    covered = float(np.sum([measured.class_times_s[name] for name in table])) / measured.step_time_s
    master = precision(plan.precision).parameter
    named = {label(name, master if name == OPTIMIZER else path): rows for name, rows in table.items()}
    together = merged(profile.operator_table, *[named] * PROBE_WEIGHT)
    steps = (*profile.steps, f"{measured.step.workload} ({measured.step.strategy})")
    return replace(profile, operator_table=together, steps=steps), covered


def _cpu_costs(profile: MachineProfile, bare: Device, path: DType) -> tuple[Formula, Mapping[str, Cost], float]:
    costs = {name: ClassCost(*class_constants(bare, name, path)) for name in CLASSES}
    return CPU_FORMULA, costs, profile.framework_launch_s


def _gpu_costs(profile: MachineProfile, measured: Measurement) -> tuple[Formula, Mapping[str, Cost], float]:
    """Factors of the profile; the host's time passes beside the kernels, not in them."""
    factors = {name: Factor(profile.constants.get(factor_name(name, path_of(name, measured)), 1.0)) for name in CLASSES}
    return gpu_formula(catalog.device(profile.data_sheet)), factors, 0.0


def _size(m: Measurement, work: Workload, before: MachineProfile, after: MachineProfile, *, fitted: bool) -> ProbedSize:
    def seconds(device: Device) -> float:
        return schedule(work, single_core(device), m.step.parsed(), runtime=runtime_of(device)).step_time_s

    return ProbedSize(m.step.parsed().micro_batch, m.step_time_s, m.noise, seconds(before.device()), seconds(after.device()), fitted)
