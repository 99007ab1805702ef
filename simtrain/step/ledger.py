"""The memory ledger: every kind of device memory over a step, in host program order, and its peak.

PyTorch allocates when the host issues an operation, so the order is the program's, not the device's. States are persistent; everything
else comes from replaying the operators of each pass (`occupancy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from simtrain.core.hardware import Device
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import Precision
from simtrain.core.result import MemoryKind, MemoryReport, MemoryTimeline
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import OPTIMIZERS, Strategy
from simtrain.core.workload import Parameter, Workload
from simtrain.step.occupancy import BLOCK_BYTES, COLUMN, KINDS, Mode, Occupancy, Sizer, occupancy, unsaved_cast_bytes
from simtrain.step.passes import Pass, micro_batch_passes
from simtrain.step.specialize import ConcreteLayer, concrete_layers

SHOWN_MICRO_BATCHES = 16
"""Micro-batches that a ledger replays; from the second on they are alike, so more would not change the peak."""

FORWARD = (Mode.FORWARD, Mode.FORWARD_DROPPING)
STEP_COUNTER_BYTES = 4
"""AdamW keeps a step counter tensor per parameter (`torch/optim/adamw.py`)."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Memory of one rank over a step.

    Attributes:
        labels: `micro-batch/pass/layer/operator` of each moment.
        moments: Bytes by kind, shape (moments, kinds).
        passes: Index of the pass (in execution order) that each moment belongs to; -1 before, and after the last.
    """

    labels: tuple[str, ...]
    moments: FloatArray
    passes: np.ndarray

    @property
    def peak(self) -> int:
        """Index of the moment with the most memory."""
        return int(np.argmax(self.moments.sum(axis=1)))


def ledger(workload: Workload, strategy: Strategy, precision: Precision, runtime: Runtime, replicas: int) -> Ledger:
    """Replays a step's memory: its micro-batches (at most `SHOWN_MICRO_BATCHES`, more of them are alike), then the optimizer.

    Args:
        workload: What is trained.
        strategy: How.
        precision: Number formats.
        runtime: Allocator, optimizer form, bucket views.
        replicas: Data-parallel degree (buckets and sharded states depend on it).
    """
    concrete = concrete_layers(workload, precision, runtime)
    base = _persistent(workload, strategy, precision, runtime, replicas)
    labels, rows, owner = ["start"], [base], [-1]
    memo: dict[tuple[object, ...], Occupancy] = {}
    index = 0
    views = replicas > 1 and runtime.gradient_as_bucket_view
    first = micro_batch_passes(workload, concrete, strategy.checkpoint, accumulating=views)
    later = micro_batch_passes(workload, concrete, strategy.checkpoint, accumulating=True)
    for micro_batch in range(min(strategy.accumulation, SHOWN_MICRO_BATCHES)):
        casts = np.zeros(len(KINDS))
        passes = later if micro_batch else first
        for i, step in enumerate(passes):
            replay = _replay(step, concrete, strategy.micro_batch, workload.sequence, runtime, memo)
            labels += [f"{micro_batch}/{step.mode.value}/{workload.layers[step.kind].name}.{step.layer}/{name}" for name in replay.names]
            rows += list(base + replay.moments)
            owner += [index] * len(replay.names)
            base = base + replay.net
            if step.mode in FORWARD:
                sizer = Sizer(concrete[step.kind], strategy.micro_batch, workload.sequence, runtime)
                casts = casts + unsaved_cast_bytes(concrete[step.kind], step.mode, sizer)
                if passes[i + 1].mode not in FORWARD:
                    base = base - casts  # autocast is left after the loss
            index += 1
    labels.append("optimizer")
    rows.append(base + _optimizer_transients(workload, strategy, precision, runtime, replicas))
    owner.append(index)
    return Ledger(tuple(labels), np.array(rows), np.array(owner, dtype=np.int64))


def _replay(
    step: Pass, concrete: tuple[ConcreteLayer, ...], batch: int, sequence: int, runtime: Runtime, memo: dict[tuple[object, ...], Occupancy]
) -> Occupancy:
    key = (step.kind, step.mode, step.context)
    if key not in memo:
        layer = concrete[step.kind]
        memo[key] = occupancy(layer, step.mode, step.context, Sizer(layer, batch, sequence, runtime))
    return memo[key]


def _parameters(workload: Workload) -> list[tuple[Parameter, int]]:
    return [(p, layer.repeats) for layer in workload.layers for p in layer.parameters if p.tied_to is None]


def _rounded(elements: int, size: float, caching: bool) -> tuple[float, float]:
    exact = elements * size
    return exact, (-exact % BLOCK_BYTES if caching else 0.0)


def _persistent(workload: Workload, strategy: Strategy, precision: Precision, runtime: Runtime, replicas: int) -> FloatArray:
    row = np.zeros(len(KINDS))
    caching = runtime.allocator == "caching"
    shards = replicas if strategy.zero >= 1 else 1
    adam = OPTIMIZERS[strategy.optimizer] == 2
    states = OPTIMIZERS[strategy.optimizer] + (precision.master is not None)
    for parameter, repeats in _parameters(workload):
        weights = _rounded(parameter.elements, precision.parameter.size_bytes, caching)
        state = _rounded(parameter.elements, precision.state.size_bytes, caching)
        row[COLUMN[MemoryKind.PARAMETER]] += repeats * weights[0]
        row[COLUMN[MemoryKind.OPTIMIZER]] += repeats * (states * state[0] + STEP_COUNTER_BYTES * adam) / shards
        row[COLUMN[MemoryKind.ROUNDING]] += repeats * (weights[1] + states * state[1] / shards)
        if precision.master is not None:  # gradients in the master's format live beside those of the weights
            row[COLUMN[MemoryKind.GRADIENT]] += repeats * state[0]
    gradient_bytes = row[COLUMN[MemoryKind.PARAMETER]]
    if replicas > 1:
        # buckets hold a second copy of the gradients, or the gradients themselves
        column = MemoryKind.GRADIENT if runtime.gradient_as_bucket_view else MemoryKind.COMMUNICATION
        row[COLUMN[column]] += gradient_bytes
    row[COLUMN[MemoryKind.PARAMETER]] += sum(layer.buffer_bytes * layer.repeats for layer in workload.layers)
    row[COLUMN[MemoryKind.INPUT]] += workload.input_bytes(strategy.micro_batch, workload.sequence)
    row[COLUMN[MemoryKind.WORKSPACE]] += runtime.workspace_bytes
    return row


def _optimizer_transients(workload: Workload, strategy: Strategy, precision: Precision, runtime: Runtime, replicas: int) -> FloatArray:
    """Temporaries of the update: AdamW forms a denominator, for all parameters at once (multi-tensor) or tensor by tensor."""
    row = np.zeros(len(KINDS))
    if OPTIMIZERS[strategy.optimizer] < 2 or runtime.optimizer_style == "fused":
        return row
    size = precision.state.size_bytes
    shards = replicas if strategy.zero >= 1 else 1
    if runtime.optimizer_style == "foreach":
        row[COLUMN[MemoryKind.TRANSIENT]] = sum(p.elements * n for p, n in _parameters(workload)) * size / shards
    else:
        # the root of the second moment and the denominator made from it, while the denominator of the parameter before is still held
        sizes = [p.elements for layer in workload for p in layer.parameters if p.tied_to is None]
        row[COLUMN[MemoryKind.TRANSIENT]] = max(2 * own + before for before, own in pairwise([0, *sizes])) * size
    return row


def report(book: Ledger, device: Device, runtime: Runtime, rank_class: str, moment_times_s: FloatArray | None = None) -> MemoryReport:
    """Summarises a ledger against a device's capacity.

    Args:
        book: The ledger.
        device: Whose memory.
        runtime: Reserved factor and driver context.
        rank_class: For the report.
        moment_times_s: Device time of each moment, if known.
    """
    peak = book.moments[book.peak]
    allocated = float(peak.sum())
    reserved = allocated * runtime.reserved_factor
    times = np.linspace(0.0, 1.0, len(book.labels)) if moment_times_s is None else moment_times_s
    return MemoryReport(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        device_bytes=reserved + runtime.context_bytes,
        capacity_bytes=device.memory.capacity_bytes,
        by_kind_bytes={kind.value: float(v) for kind, v in zip(KINDS, peak, strict=True) if v > 0},
        peak_moment=book.labels[book.peak],
        rank_class=rank_class,
        timeline=MemoryTimeline(book.labels, book.moments, times),
    )
