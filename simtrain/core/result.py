"""What a prediction returns: frozen plain data, SI units, with what was assumed and where numbers come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simtrain.core.polynomial import FloatArray
from simtrain.core.units import format_bytes, format_time


class MemoryKind(StrEnum):
    """What device memory is used for."""

    PARAMETER = "parameter"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    ACTIVATION = "activation"
    RECOMPUTED = "recomputed"
    LOGITS = "logits"
    TRANSIENT = "transient"
    CAST = "cast"
    COMMUNICATION = "communication"
    WORKSPACE = "workspace"
    INPUT = "input"
    ROUNDING = "rounding"


@dataclass(frozen=True, slots=True, eq=False)
class MemoryTimeline:
    """Allocated memory over a step, in host program order (PyTorch allocates when the host issues an operation).

    Attributes:
        moments: Label of each moment.
        bytes_by_kind: Array of shape (moments, kinds) in the order of `MemoryKind`.
        time_s: Time of each moment on the device, where the reader knows it; else evenly spaced.
    """

    moments: tuple[str, ...]
    bytes_by_kind: NDArray[np.float64]
    time_s: FloatArray

    @property
    def total_bytes(self) -> FloatArray:
        """Allocated bytes at each moment."""
        return np.asarray(self.bytes_by_kind.sum(axis=1), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Memory of the rank class that needs most.

    Attributes:
        allocated_bytes: Peak of what tensors occupy in the allocator.
        reserved_bytes: What the allocator takes from the device for it: its segments, replayed where it is PyTorch's.
        device_bytes: Reserved, plus driver context: what a system monitor shows.
        capacity_bytes: What the device has.
        by_kind_bytes: The peak split by `MemoryKind`.
        peak_moment: When the peak occurs.
        rank_class: Which ranks.
        timeline: Over the step (`None` where the reader does not compute it).
        allocated_by_class_bytes: The peak of every rank class, those of the first pipeline stage first.
        host_bytes: What was moved to host memory, with the buffers that it passes through, on the fullest node.
        host_capacity_bytes: Host memory of that node (0 where nothing is moved or it is not known).
        nvme_bytes: What was moved to its drives.
        nvme_capacity_bytes: What they hold.
        blocks_bytes: Peak of the blocks that hold the tensors, which PyTorch's statistics call allocated (0 where they are not replayed).
    """

    allocated_bytes: float
    reserved_bytes: float
    device_bytes: float
    capacity_bytes: float
    by_kind_bytes: Mapping[str, float]
    peak_moment: str
    rank_class: str
    timeline: MemoryTimeline | None = None
    allocated_by_class_bytes: Mapping[str, float] = field(default_factory=dict)
    host_bytes: float = 0.0
    host_capacity_bytes: float = 0.0
    nvme_bytes: float = 0.0
    nvme_capacity_bytes: float = 0.0
    blocks_bytes: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether it fits the device, and what was moved fits the host and its drives."""
        return self.device_bytes <= self.capacity_bytes and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether what was moved fits the host's memory and drives."""
        return self.host_bytes <= self.host_capacity_bytes and self.nvme_bytes <= self.nvme_capacity_bytes

    @property
    def over_bytes(self) -> float:
        """By how much it does not fit (negative: what is left)."""
        return self.device_bytes - self.capacity_bytes


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One executed term, for timelines.

    Attributes:
        name: What ran.
        category: `TermKind` name in lower case.
        rank_class: Who ran it.
        stream: On which stream.
        start_s: From the start of the step shown.
        duration_s: How long.
        micro_batch: Which one (-1 for none).
    """

    name: str
    category: str
    rank_class: str
    stream: str
    start_s: float
    duration_s: float
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Result:
    """A prediction of one training step in steady state.

    Attributes:
        workload: Name.
        cluster: Name.
        strategy: As `str(strategy)`.
        runtime: Name.
        reader: "estimate", "schedule" or "simulate".
        fits: Whether it fits the devices' memory; if not, times are what it would take.
        step_time_s: Period of the steady state.
        samples_per_s: Over all replicas.
        tokens_per_s: Over all replicas.
        global_batch: Samples per step.
        devices: Ranks used.
        model_flops: FLOPs of a step, recomputation not counted, attention in full.
        mfu: Model FLOPs over dense peak of the arithmetic path; attention in full, causal or not (the convention of most papers).
        mfu_causal: The same with causal attention counted as the lower triangle that is computed.
        breakdown_s: The period split by what is exposed on the slowest rank: compute, recompute, optimizer, communication, offload, host,
            bubble, wait. Sums to `step_time_s`.
        busy_s: Seconds each stream of that rank is busy, overlapped or not.
        memory: Of the rank class that needs most.
        energy_j: Per step, all devices and hosts.
        power_w: Average.
        cost_usd: Per step.
        bound_by: The largest part of the breakdown.
        assumptions: What was assumed or left out, in words.
        sources: What the numbers rest on.
        events: One steady step, for timelines (empty for `estimate`).
    """

    workload: str
    cluster: str
    strategy: str
    runtime: str
    reader: str
    fits: bool
    step_time_s: float
    samples_per_s: float
    tokens_per_s: float
    global_batch: int
    devices: int
    model_flops: float
    mfu: float
    mfu_causal: float
    breakdown_s: Mapping[str, float]
    busy_s: Mapping[str, float]
    memory: MemoryReport
    energy_j: float
    power_w: float
    cost_usd: float
    bound_by: str
    assumptions: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    events: tuple[TraceEvent, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain data for JSON: its own field names, SI units; timelines and events are left out."""
        data = {k: v for k, v in ((f, getattr(self, f)) for f in self.__dataclass_fields__) if k not in ("memory", "events")}
        memory = self.memory
        data["memory"] = {k: getattr(memory, k) for k in memory.__dataclass_fields__ if k != "timeline"} | {
            "fits": memory.fits,
            "over_bytes": memory.over_bytes,
        }
        return {k: _plain(v) for k, v in data.items()}

    def report(self, path: Path | str) -> None:
        """Writes one HTML file about it that needs no network: `simtrain.report.write_page`.

        Raises:
            InputError: The file cannot be written, or does not end in .html.
        """
        import_module("simtrain.report").write_page(self, path)  # by name: what people read is far above what is known here

    def __str__(self) -> str:
        """A short summary; `simtrain.report.tables` prints the long one."""
        memory = f"{format_bytes(self.memory.device_bytes)} of {format_bytes(self.memory.capacity_bytes)}"
        verdict = "fits" if self.fits else f"OUT OF MEMORY by {format_bytes(self.memory.over_bytes)}"
        if not self.memory.fits_host and self.memory.over_bytes <= 0:
            verdict = "OUT OF HOST MEMORY, see assumptions"
        return (
            f"{self.workload} on {self.cluster} [{self.strategy}]: step {format_time(self.step_time_s)}, "
            f"{self.samples_per_s:.3g} samples/s, MFU {self.mfu:.1%}, memory {memory} ({verdict}), bound by {self.bound_by}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


__all__ = ["MemoryKind", "MemoryReport", "MemoryTimeline", "Result", "TraceEvent"]
