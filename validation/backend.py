"""What measuring a training step needs of a device, behind one interface: the processor's core, or a CUDA device.

CUDA: whole steps are timed by events on the stream, so that the host runs ahead as in training; operators by the profiler's kernel times;
peak memory by the caching allocator's own counters. Not yet run on CUDA hardware: the CUDA calls follow PyTorch's documentation
(2.11 to 2.13), and everything around them is tested with an implementation of the same calls on the processor.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Protocol

from hardware_models.cpu import kernel_class
from hardware_models.measured import measured_class
from simtrain.core.errors import InputError, UnsupportedError
from simtrain.core.workload import OperatorKind
from validation.operator_times import ClassTimes
from validation.profiler_times import UPDATE, operator_row

AUTOCAST_DTYPES = {"bf16-amp": "bfloat16", "fp16-amp": "float16"}
NVIDIA_SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


class Trainable(Protocol):
    """What a backend runs: `validation.training.Training`."""

    def passes(self) -> None:
        """Forward and backward of all micro-batches."""

    def update(self) -> None:
        """The optimizer."""

    def step(self) -> None:
        """Both."""


class Backend(Protocol):
    """A device that training steps are measured on.

    Attributes:
        name: "cpu" or "cuda".
        torch_device: As PyTorch names it.
    """

    name: str
    torch_device: str

    def kernel_class(self, kind: OperatorKind, name: str) -> str:
        """Returns the class of an operator."""

    def prepare(self, core: int | None, threads: int) -> None:
        """Sets the process up, once."""

    def autocast(self, precision: str) -> Callable[[], AbstractContextManager[Any]]:
        """Sets how products of fp32 tensors run, and returns what the forward pass runs under.

        Raises:
            UnsupportedError: The precision cannot be measured here.
        """

    def timed_steps_s(self, training: Trainable, count: int, between: Callable[[int], None]) -> tuple[list[float], list[int]]:
        """Runs steps; returns the time and the page faults of each. `between(i)` is called after step i, outside what is timed."""

    def operator_times(self, training: Trainable, times: ClassTimes) -> None:
        """Runs a step that tells what each operator takes, and adds it to `times`."""

    def peak_bytes(self, run: Callable[[], object], held: int, others: int) -> tuple[int, int]:
        """Returns the allocation peak of running something, and the most that the allocator reserved (0 where it does no such thing).

        Args:
            run: What to run.
            held: Bytes held before that belong to it.
            others: Bytes held before that do not.
        """

    def describe(self) -> Mapping[str, str | int]:
        """Names the device: driver, libraries, clocks; empty for the processor, which the environment describes."""


class CpuBackend:
    """One pinned core: process CPU time, operators under a clock, peaks from allocator events."""

    name, torch_device = "cpu", "cpu"

    def kernel_class(self, kind: OperatorKind, name: str) -> str:
        """See `Backend`."""
        return kernel_class(kind, name)

    def prepare(self, core: int | None, threads: int) -> None:
        """Pins the process and its threads."""
        import torch

        if core is not None:
            os.sched_setaffinity(0, {core})
        torch.set_num_threads(threads)

    def autocast(self, precision: str) -> Callable[[], AbstractContextManager[Any]]:
        """See `Backend`."""
        import torch

        if precision == "fp32":
            return nullcontext
        if precision == "bf16-amp":
            return lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        raise UnsupportedError(f"precision {precision!r} cannot be measured on a CPU; use fp32 or bf16-amp")

    def timed_steps_s(self, training: Trainable, count: int, between: Callable[[int], None]) -> tuple[list[float], list[int]]:
        """Times steps by process CPU time, which other processes do not lengthen."""
        times: list[float] = []
        faults: list[int] = []
        for i in range(count):
            before = _page_faults()
            start = time.process_time()
            training.step()
            times.append(time.process_time() - start)
            faults.append(_page_faults() - before)
            between(i)
        return times, faults

    def operator_times(self, training: Trainable, times: ClassTimes) -> None:
        """Runs a step under the operator clock."""
        times.step(training.passes, training.update)

    def peak_bytes(self, run: Callable[[], object], held: int, others: int) -> tuple[int, int]:
        """See `Backend`; from the profiler's allocation events, which see buffers inside operators."""
        from validation.allocation_peak import allocation_peak_bytes

        del others
        return allocation_peak_bytes(run) + held, 0

    def describe(self) -> Mapping[str, str | int]:
        """See `Backend`."""
        return {}


class CudaBackend:
    """The first visible CUDA device. Not yet run on CUDA hardware.

    Args:
        api: `torch.cuda`, or something with the same functions.
        torch_device: Where models are put.
        profiled: Runs a function under the profiler and returns its events, and how to read an event's device time in microseconds.
    """

    name = "cuda"

    def __init__(
        self,
        api: Any = None,
        torch_device: str = "cuda",
        profiled: Callable[[Callable[[], object]], tuple[Sequence[Any], Callable[[Any], float]]] | None = None,
    ) -> None:
        import torch

        self.api = torch.cuda if api is None else api
        self.torch_device = torch_device
        self._profiled = profiled or _cuda_profile

    def kernel_class(self, kind: OperatorKind, name: str) -> str:
        """See `Backend`."""
        return measured_class(kind, name)

    def prepare(self, core: int | None, threads: int) -> None:
        """Initialises the device; threads and cores are left as they are, since the host only launches."""
        del core, threads
        self.api.init()

    def autocast(self, precision: str) -> Callable[[], AbstractContextManager[Any]]:
        """See `Backend`; TF32 is switched off for every precision but tf32, for products and convolutions alike."""
        import torch

        tf32 = precision == "tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        if precision in ("fp32", "tf32"):
            return nullcontext
        if precision in AUTOCAST_DTYPES:
            dtype = getattr(torch, AUTOCAST_DTYPES[precision])
            return lambda: torch.autocast(torch.device(self.torch_device).type, dtype=dtype)
        raise UnsupportedError(f"precision {precision!r} cannot be measured; use fp32, tf32, {' or '.join(AUTOCAST_DTYPES)}")

    def timed_steps_s(self, training: Trainable, count: int, between: Callable[[int], None]) -> tuple[list[float], list[int]]:
        """Times steps by events between them, without waiting: the host issues ahead of the device as it does in training."""
        marks = [self._mark()]
        for _ in range(count):
            training.step()
            marks.append(self._mark())
        self.api.synchronize()
        times = [a.elapsed_time(b) * 1e-3 for a, b in pairwise(marks)]
        for i in range(count):
            between(i)
        return times, [0] * count

    def _mark(self) -> Any:
        event = self.api.Event(enable_timing=True)
        event.record()
        return event

    def operator_times(self, training: Trainable, times: ClassTimes) -> None:
        """Runs a step under the profiler; an operator's time is that of the kernels it launched."""
        from torch.profiler import record_function

        def run() -> None:
            training.passes()
            with record_function(UPDATE):
                training.update()
            self.api.synchronize()

        self.api.synchronize()
        events, device_us = self._profiled(run)
        times.rows.append(operator_row(events, device_us, measured_class))

    def peak_bytes(self, run: Callable[[], object], held: int, others: int) -> tuple[int, int]:
        """See `Backend`; the allocator's own peak, workspaces of libraries included."""
        del held
        gc.collect()
        self.api.empty_cache()
        self.api.reset_peak_memory_stats()
        run()
        self.api.synchronize()
        return int(self.api.max_memory_allocated()) - others, int(self.api.max_memory_reserved()) - others

    def describe(self) -> Mapping[str, str | int]:
        """See `Backend`; clocks and driver as nvidia-smi says, where it is installed."""
        import torch

        found = self.api.get_device_properties(0)
        described: dict[str, str | int] = {
            "name": str(found.name),
            "multiprocessors": int(found.multi_processor_count),
            "memory_bytes": int(found.total_memory),
            "cuda_version": str(torch.version.cuda),
            "cudnn_version": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        }
        return described | _nvidia_smi()


def backend(name: str) -> Backend:
    """Returns the backend of a device.

    Raises:
        InputError: No such device, or PyTorch sees none of the kind.
    """
    if name == "cpu":
        return CpuBackend()
    if name != "cuda":
        raise InputError(f"--device must be cpu or cuda, not {name!r}")
    import torch

    if not torch.cuda.is_available():
        built = "is built without CUDA: install a CUDA build" if torch.version.cuda is None else "finds no GPU: check nvidia-smi"
        raise InputError(f"there is no CUDA device: torch {torch.__version__} {built}, or measure the processor with --device cpu")
    return CudaBackend()


def _cuda_profile(run: Callable[[], object]) -> tuple[Sequence[Any], Callable[[Any], float]]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
    return recorded.events() or (), lambda event: float(event.device_time_total)


def _nvidia_smi() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    said = subprocess.run([tool, f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    lines = said.stdout.splitlines()
    if said.returncode != 0 or not lines:
        return {}
    return dict(zip(NVIDIA_SMI.replace(".", "_").split(","), (part.strip() for part in lines[0].split(",")), strict=False))


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
