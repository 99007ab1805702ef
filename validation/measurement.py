"""What a measurement is: plain data with where, when and how it was taken, and a JSON form that reads back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from validation.steps import TrainingStep


@dataclass(frozen=True, slots=True)
class Settings:
    """How training steps are measured.

    Attributes:
        warmup_steps: Steps before anything is timed (the allocator settles in the first two).
        timed_steps: Steps whose median is the result.
        operator_steps: Steps under the per-operator clock, apart from the timed ones (0 to leave operators out).
        processes: Fresh processes per training step; the result is the median of their medians.
        memory: Whether peak memory is measured too, in a process of its own.
        threads: Threads inside an operator (on the processor).
        device: "cpu" or "cuda".
        reference_repetitions: Runs of the reference workload before and after each training step (0 to leave it out).
    """

    warmup_steps: int = 3
    timed_steps: int = 9
    operator_steps: int = 0
    processes: int = 1
    memory: bool = True
    threads: int = 1
    device: str = "cpu"
    reference_repetitions: int = 0


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and when measurements were taken.

    Attributes:
        cpu_model: As the system names it.
        cores: Cores the process may use.
        torch_version: With its build suffix.
        python_version: Of the interpreter.
        system: Operating system and C library.
        date_utc: ISO date and time.
        load_average: One-minute load when it began.
        allocator: Environment variables that fix the C library's allocator.
        memory_bytes: Main memory of the machine (0 where the system does not say).
        accelerator: Name, driver, libraries and clocks of the device that trained; empty where the processor did.
    """

    cpu_model: str
    cores: int
    torch_version: str
    python_version: str
    system: str
    date_utc: str
    load_average: float
    allocator: Mapping[str, str]
    memory_bytes: int = 0
    accelerator: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One training step as it really ran on this machine.

    Attributes:
        step: What was run.
        step_time_s: Of a step, median: process CPU time, on a GPU the time between events on its stream.
        noise: Interquartile range over the median, within a process.
        process_spread: Largest over smallest median of fresh processes, minus one (0 for a single process).
        peak_memory_bytes: Peak of what tensors occupy, from the allocator (0 if not measured).
        class_times_s: Time per step inside operators, by operator class (empty if not measured).
        class_calls: Operator calls per step, by operator class.
        page_faults_per_step: Minor faults per timed step; near 0 when buffers are reused.
        settings: How it was measured.
        environment: Where and when.
        call_times_s: Time of every operator call, by class in program order (empty if not measured).
        reserved_memory_bytes: The most that a caching allocator had reserved (0 where there is none).
        process_times_s: Median step time of each fresh process.
        reference_times_s: What the reference workload took beside the step in each process: mean of before and after (empty if not
            measured).
    """

    step: TrainingStep
    step_time_s: float
    noise: float
    process_spread: float
    peak_memory_bytes: int
    class_times_s: Mapping[str, float]
    class_calls: Mapping[str, int]
    page_faults_per_step: float
    settings: Settings = field(default_factory=Settings)
    environment: Environment | None = None
    call_times_s: Mapping[str, Sequence[float]] = field(default_factory=dict)
    reserved_memory_bytes: int = 0
    process_times_s: tuple[float, ...] = ()
    reference_times_s: tuple[float, ...] = ()

    def at_reference(self, reference_time_s: float) -> Measurement:
        """Returns what would have been measured had the reference workload taken a given time beside the step, in every process.

        All times are scaled alike: those of a process by the reference's beside it, those inside operators as the step's median. Where the
        reference was not timed, or the given time is 0, the measurement is returned as it is.
        """
        if not (self.reference_times_s and reference_time_s):
            return self
        pairs = zip(self.process_times_s, self.reference_times_s, strict=True)
        times = tuple(time_s * reference_time_s / beside_s for time_s, beside_s in pairs)
        factor = median(times) / self.step_time_s
        return replace(
            self,
            step_time_s=median(times),
            process_spread=max(times) / min(times) - 1,
            class_times_s={name: factor * time_s for name, time_s in self.class_times_s.items()},
            call_times_s={name: [factor * time_s for time_s in calls] for name, calls in self.call_times_s.items()},
            process_times_s=times,
            reference_times_s=(reference_time_s,) * len(times),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON; `from_dict` reads it back."""
        return asdict(self) | {"step": self.step.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Reads what `to_dict` wrote."""
        values = dict(data)
        values["step"] = TrainingStep.from_dict(values["step"])
        values["settings"] = Settings(**values["settings"])
        values["environment"] = Environment(**values["environment"]) if values["environment"] else None
        for name in ("process_times_s", "reference_times_s"):  # files of older measurements lack them
            values[name] = tuple(values.get(name, ()))
        return cls(**values)
