"""Running real training steps in fresh processes on a quiet, fixed core, with an allocator that reuses its buffers, or on a GPU.

On a GPU a process runs the whole list: starting a process and its CUDA context takes longer than a step's measurement.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from simtrain.core.errors import InputError, SimtrainError
from validation.measurement import Environment, Measurement, Settings
from validation.steps import TrainingStep

ALLOCATOR_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
    "MALLOC_ARENA_MAX": "1",
}
"""glibc: never map big blocks apart, never give memory back, grow in large pieces.

Raising `MALLOC_MMAP_THRESHOLD_` does not do: above 32 MiB glibc ignores it, and every larger buffer is mapped, zeroed page by page and
unmapped in each step (64,000 faults and 13 % of a step in a model with 32 MB logits; none with these settings).
"""
THREAD_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Progress = Callable[[str], None]
"""Called with a line of text as measurements come in."""


class MeasurementError(SimtrainError):
    """A measuring process failed; the message ends with what it wrote."""

    exit_code = 4


def measure(steps: Sequence[TrainingStep], settings: Settings, progress: Progress | None = None) -> tuple[Measurement, ...]:
    """Measures training steps on this machine.

    Args:
        steps: What to run.
        settings: How.
        progress: Told about each finished step.

    Raises:
        MeasurementError: A process failed.
        InputError: PyTorch is not installed.
    """
    here = environment(settings.device)
    rounds: dict[str, list[dict[str, Any]]] = {step.name: [] for step in steps}
    for number in range(settings.processes):
        for together in [(step,) for step in steps] if settings.device == "cpu" else [tuple(steps)]:
            for name, answer in run_worker(together, settings, memory=False).items():
                rounds[name].append(answer)
                if progress:
                    progress(f"{name}: {_said(answer)}" + (f" (process {number + 1})" if number else ""))
    peaks = run_worker(steps, settings, memory=True) if settings.memory else {}
    return tuple(_combine(step, rounds[step.name], peaks.get(step.name, {}), settings, here) for step in steps)


def _said(answer: Mapping[str, Any]) -> str:
    beside = f", reference {answer['reference_time_s'] * 1e3:.1f} ms" if answer["reference_time_s"] else ""
    return f"{answer['step_time_s'] * 1e3:.1f} ms{beside}"


def _combine(
    step: TrainingStep, rounds: Sequence[dict[str, Any]], peak: dict[str, Any], settings: Settings, here: Environment
) -> Measurement:
    times = [r["step_time_s"] for r in rounds]
    names = rounds[0]["class_times_s"]
    return Measurement(
        step=step,
        step_time_s=median(times),
        noise=median(r["noise"] for r in rounds),
        process_spread=max(times) / min(times) - 1,
        peak_memory_bytes=int(peak.get("peak_memory_bytes", 0)),
        class_times_s={name: median(r["class_times_s"][name] for r in rounds) for name in names},
        class_calls=rounds[0]["class_calls"],
        page_faults_per_step=median(r["page_faults_per_step"] for r in rounds),
        settings=settings,
        environment=here,
        call_times_s=rounds[0]["call_times_s"],
        reserved_memory_bytes=int(peak.get("reserved_memory_bytes", 0)),
        process_times_s=tuple(times),
        reference_times_s=tuple(r["reference_time_s"] for r in rounds if r["reference_time_s"]),
    )


def run_worker(steps: Sequence[TrainingStep], settings: Settings, *, memory: bool) -> dict[str, dict[str, Any]]:
    """Runs one fresh measuring process and returns what it says about each step, by name.

    Args:
        steps: What to run, in this order.
        settings: How.
        memory: Measure peak memory rather than time.

    Raises:
        MeasurementError: The process failed.
    """
    on_cpu = settings.device == "cpu"
    request = {
        "steps": [s.to_dict() for s in steps],
        "settings": {f: getattr(settings, f) for f in settings.__dataclass_fields__},
        "core": quietest_core() if on_cpu else None,
        "memory": memory,
    }
    variables = os.environ | (worker_environment(settings.threads) if on_cpu else {})
    command = [sys.executable, "-P", "-m", "validation.worker"]
    process = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=variables, check=False)
    if process.returncode != 0:
        raise MeasurementError(f"measuring {', '.join(s.name for s in steps)} failed: {process.stderr.strip()[-2000:]}")
    answers = (json.loads(line) for line in process.stdout.splitlines() if line.startswith("{"))
    return {answer["name"]: answer for answer in answers}


def worker_environment(threads: int = 1) -> dict[str, str]:
    """Returns the environment variables that fix allocator and threads of a process that measures the processor."""
    return ALLOCATOR_ENVIRONMENT | dict.fromkeys(THREAD_ENVIRONMENT, str(threads))


def environment(device: str = "cpu") -> Environment:
    """Describes this machine, now.

    Args:
        device: What is measured: "cpu" or "cuda".

    Raises:
        InputError: PyTorch is not installed, or sees no such device.
    """
    installed = torch_version()
    if installed is None:
        raise InputError("measuring needs PyTorch: install simtrain[torch]")
    return Environment(
        cpu_model=cpu_model(),
        cores=len(_cores()),
        torch_version=installed,
        python_version=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        date_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        allocator=ALLOCATOR_ENVIRONMENT if device == "cpu" else {},
        memory_bytes=_memory_bytes(),
        accelerator=_accelerator(device),
    )


def _accelerator(device: str) -> Mapping[str, str | int]:
    if device == "cpu":
        return {}
    from validation.backend import backend

    return backend(device).describe()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def torch_version() -> str | None:
    """Returns the version of the installed PyTorch, its build included, without importing it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Names this machine's processor, with family and model number where the name alone is vague."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def quietest_core(interval_s: float = 0.1) -> int | None:
    """Returns the allowed core with the most idle time over an interval, `None` where the system cannot say or pin."""
    path = Path("/proc/stat")
    if not (path.exists() and hasattr(os, "sched_setaffinity")):
        return None
    before = _idle_ticks(path)
    time.sleep(interval_s)
    after = _idle_ticks(path)
    return max(_cores(), key=lambda core: (after.get(core, 0) - before.get(core, 0), core))


def _cores() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _idle_ticks(path: Path) -> dict[int, int]:
    rows = (line.split() for line in path.read_text().splitlines() if line.startswith("cpu") and line[3].isdigit())
    return {int(row[0][3:]): int(row[4]) for row in rows}
