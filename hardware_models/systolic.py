"""The systolic compute model: matrix products on arrays of multipliers whose weights are loaded ahead, everything else on a vector unit.

A product is cut into folds of at most `array_rows` x `array_columns`: one operand stays in the array while the other streams through, one
row per clock. The weights of the next fold are loaded while the present one streams, so that a fold takes at least `array_rows` clocks, and
filling and draining is paid once per operator. Edges that are no multiple of the array's are padded. The compiler (XLA) chooses the operand
that stays, shares folds and rows among the arrays of the chip, streams tiles through on-chip memory, and fuses neighbours that are bound by
memory. Arithmetic, vector work and memory traffic overlap.

`array_cycles` counts cycles as SCALE-Sim 3 does, for one array without any of this; it is the model's golden mode, not its prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from hardware_models.constants import checked, constant, required_architecture, sources_of
from simtrain.core.errors import InputError
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.workload import OperatorKind, Window
from simtrain.cost.roofline import ceil_div, join, triangle_share

ARCHITECTURE = ("array_rows", "array_columns")
"""Numbers that `[architecture]` must give: the edges of one array. `multiprocessors` counts the arrays of the chip."""

ROW_SPLITS = (1, 2, 4, 8, 16)
"""Parts of the streamed operand that may go to different arrays."""

ATTENTION_PRODUCTS = {OperatorKind.ATTENTION: 2, OperatorKind.ATTENTION_BACKWARD: 5}
"""Products of fused attention: scores and values; backward anew, and the gradients of three operands and the scores."""

_GEMM = (OperatorKind.GEMM, OperatorKind.BATCHED_GEMM)
_CONVOLUTION = (OperatorKind.CONVOLUTION, OperatorKind.CONVOLUTION_BACKWARD)
_GATHER = (OperatorKind.EMBEDDING, OperatorKind.EMBEDDING_BACKWARD)
_FUSIBLE = (
    OperatorKind.ELEMENTWISE,
    OperatorKind.CAST,
    OperatorKind.COPY,
    OperatorKind.REDUCTION,
    OperatorKind.NORM,
    OperatorKind.NORM_BACKWARD,
    OperatorKind.SOFTMAX,
    OperatorKind.SOFTMAX_BACKWARD,
)

VECTOR_OPERATIONS = {
    OperatorKind.NORM: 8.0,
    OperatorKind.NORM_BACKWARD: 12.0,
    OperatorKind.SOFTMAX: 16.0,
    OperatorKind.SOFTMAX_BACKWARD: 8.0,
    OperatorKind.ATTENTION: 16.0,
    OperatorKind.ATTENTION_BACKWARD: 24.0,
}
"""Assumption: vector instructions per element (per score in attention), exponentials counted as ten; 3 for kinds not named."""


class Dataflow(StrEnum):
    """Which operand stays in the array: the result, the right operand (weights) or the left one (inputs)."""

    OUTPUT = "output"
    WEIGHT = "weight"
    INPUT = "input"


@dataclass(frozen=True, slots=True)
class SystolicConstants:
    """Constants of the class; `fields(SystolicConstants)` carries meaning, source and kind of each as metadata."""

    array_share: float = constant(
        0.95, "share of clocks in which a busy array does useful work", "control and refresh; large products on TPUs reach about this"
    )
    bandwidth_share: float = constant(0.87, "share of the memory bandwidth that large transfers reach", "as measured for HBM on GPUs")
    fused_share: float = constant(
        1.0 / 3.0, "traffic that an operator keeps when it is fused with its neighbours", "of two reads and a write, one operand is new"
    )
    gather_share: float = constant(0.5, "bandwidth of gathered rows over that of whole tensors", "rows of an embedding are short")
    overlap_exponent: float = constant(
        4.0, "exponent of the power mean of arithmetic and traffic", "transfers are issued ahead by the compiler"
    )
    launch_s: float = constant(1e-6, "time between two operators of one compiled program", "a few hundred clocks of control")
    causal_block: float = constant(
        512.0, "edge of the blocks that causal attention skips", "default block of JAX's splash attention kernel"
    )


class SystolicModel:
    """Prices kernels on systolic arrays; see the module's description.

    Attributes:
        name: As devices name it in `compute_model`.
    """

    name = "systolic"

    def kernel_times_s(self, device: Device, kernels: KernelBatch) -> FloatArray:
        """Returns the time of each kernel; the time of fused neighbours is shared out among them.

        Raises:
            UnsupportedError: The device lacks the arithmetic path.
            CatalogError: The device's file lacks the array's edges, or names a constant that does not exist.
        """
        constants = constants_of(device)
        bandwidth = device.memory.bandwidth_bytes_per_s * constants.bandwidth_share
        traffic = traffic_bytes(device, kernels, constants)
        arithmetic_s = product_cycles(device, kernels, constants) / device.clock_hz
        if arithmetic_s.any():
            arithmetic_s = arithmetic_s * _slower_path(device, kernels)
        vector_s = vector_operations(kernels) / (device.multiprocessors * device.lanes_per_multiprocessor * device.clock_hz)
        busy_s = join(np.maximum(arithmetic_s, vector_s), traffic / bandwidth, constants.overlap_exponent)
        return np.asarray(busy_s + constants.launch_s * kernels.launches, dtype=np.float64)

    def sources(self, device: Device) -> tuple[str, ...]:
        """Returns what the constants rest on, and which of them the device's profile replaces."""
        return sources_of(device, SystolicConstants)


def constants_of(device: Device) -> SystolicConstants:
    """Returns the constants for a device, its profile applied.

    Raises:
        CatalogError: The device's file lacks the array's edges, or names a constant that does not exist.
    """
    required_architecture(device, ARCHITECTURE)
    checked(device, tuple(f.name for f in fields(SystolicConstants)))
    return replace(SystolicConstants(), **device.profile)


def array_cycles(m: int, n: int, k: int, rows: int, columns: int, dataflow: Dataflow = Dataflow.WEIGHT) -> int:
    """Cycles of one product on one array, without overlap of folds: the compute cycles that SCALE-Sim 3 reports.

    The mapped edges are (m, n) for a stationary output, (k, n) for weights and (k, m) for inputs; the third is streamed.

    Args:
        m: Rows of the result.
        n: Columns of the result.
        k: Contraction.
        rows: Of the array.
        columns: Of the array.
        dataflow: Operand that stays.

    Raises:
        InputError: An extent below 1.
    """
    if min(m, n, k, rows, columns) < 1:
        raise InputError(f"a product of {m} x {n} x {k} on an array of {rows} x {columns}: every extent must be at least 1")
    down, across, streamed = {Dataflow.OUTPUT: (m, n, k), Dataflow.WEIGHT: (k, n, m), Dataflow.INPUT: (k, m, n)}[dataflow]
    folds = -(-down // rows) * -(-across // columns)
    fill = rows if dataflow is Dataflow.OUTPUT else 2 * rows
    return folds * (fill + columns + streamed - 2) - 1


def preloaded_cycles(device: Device, batch: FloatArray, m: FloatArray, n: FloatArray, k: FloatArray) -> FloatArray:
    """Cycles of (batched) products on all arrays of a chip, weights loaded ahead: the better operand to keep and the better split."""
    rows, columns = device.architecture["array_rows"], device.architecture["array_columns"]
    best: FloatArray = np.full(np.shape(m), np.inf)
    for across, streamed in ((n, m), (m, n)):
        folds = batch * ceil_div(k, rows) * ceil_div(across, columns)
        for split in ROW_SPLITS:
            cycles = ceil_div(folds * split, device.multiprocessors) * np.maximum(ceil_div(streamed, split), rows)
            np.minimum(best, cycles, out=best)
    return best + 2 * rows + columns


def product_cycles(device: Device, kernels: KernelBatch, constants: SystolicConstants) -> FloatArray:
    """Cycles of the arithmetic that runs on the arrays; zero for other kernels."""
    cycles = np.zeros(len(kernels))
    b, m, n, k = kernels.batch, kernels.m, kernels.n, kernels.k
    chosen = kernels.mask(*_GEMM)
    cycles[chosen] = preloaded_cycles(device, b[chosen], m[chosen], n[chosen], k[chosen])
    for kind, products in ATTENTION_PRODUCTS.items():
        chosen = kernels.mask(kind)
        both = preloaded_cycles(device, b[chosen], m[chosen], n[chosen], k[chosen])
        both = both + preloaded_cycles(device, b[chosen], m[chosen], k[chosen], n[chosen])
        blocks = np.maximum(ceil_div(n[chosen], constants.causal_block), 1.0)
        cycles[chosen] = products / 2 * both * np.where(kernels.causal[chosen], triangle_share(blocks), 1.0)
    chosen = kernels.mask(OperatorKind.CONVOLUTION)
    cycles[chosen] = preloaded_cycles(device, b[chosen], m[chosen], n[chosen], k[chosen])
    chosen = kernels.mask(OperatorKind.CONVOLUTION_BACKWARD)
    if chosen.any():
        cycles[chosen] = _convolution_backward_cycles(device, kernels, chosen)
    return cycles / constants.array_share


def _convolution_backward_cycles(device: Device, kernels: KernelBatch, chosen: NDArray[np.bool_]) -> FloatArray:
    """Gradients of filter (contracting over pixels) and input (a row for every pixel read); a first layer has only the former."""
    b, m, n, k = (array[chosen] for array in (kernels.batch, kernels.m, kernels.n, kernels.k))
    windows = [kernels.windows[i] if kernels.windows else Window() for i in np.flatnonzero(chosen)]
    taps = np.array([w.edge**2 for w in windows], dtype=np.float64)
    area = np.array([min(w.stride, w.edge) ** 2 for w in windows], dtype=np.float64)
    to_filter = preloaded_cycles(device, b, n, k, m)
    to_input = preloaded_cycles(device, b, m * area, k / taps, n * taps / area)
    return to_filter + np.where(kernels.flops[chosen] > 3.0 * b * m * n * k, to_input, 0.0)


def vector_operations(kernels: KernelBatch) -> FloatArray:
    """Instructions of the vector unit: per element written or read, per score in attention."""
    elements = kernels.bytes_moved / np.maximum(kernels.element_bytes, 1.0) / 2.0
    attention = kernels.mask(*ATTENTION_PRODUCTS)
    scores = kernels.batch * kernels.m * kernels.n * np.where(kernels.causal, triangle_share(np.maximum(kernels.n, 1.0)), 1.0)
    per_element = np.array([VECTOR_OPERATIONS.get(kind, 3.0) for kind in kernels.kinds])
    on_arrays = kernels.mask(*_GEMM, *_CONVOLUTION)
    return np.where(on_arrays, 0.0, np.where(attention, scores, elements) * per_element)


def traffic_bytes(device: Device, kernels: KernelBatch, constants: SystolicConstants) -> FloatArray:
    """Bytes between chip and memory: products read operands once per block of results held on chip, fused neighbours keep a share."""
    moved = kernels.bytes_moved.copy()
    chosen = kernels.mask(*_GEMM)
    m, n, k, width = kernels.m[chosen], kernels.n[chosen], kernels.k[chosen], kernels.element_bytes[chosen]
    # A third of on-chip memory each for fp32 results, the operands in use and those on their way.
    edge = np.sqrt(device.cache_bytes / 3.0 / 4.0)
    again = kernels.batch[chosen] * width * (m * k * (np.maximum(1.0, n / edge) - 1) + k * n * (np.maximum(1.0, m / edge) - 1))
    moved[chosen] += np.where(np.minimum(m, n) > edge, again, 0.0)
    moved[kernels.mask(*_GATHER)] /= constants.gather_share
    for start, end in _runs(kernels):
        group = moved[start:end]
        largest = int(np.argmax(group))
        keep = np.full(len(group), constants.fused_share)
        keep[largest] = 1.0
        moved[start:end] = group * keep
    return moved


def _runs(kernels: KernelBatch) -> list[tuple[int, int]]:
    """Places of neighbours that the compiler fuses, as start and end."""
    runs: list[tuple[int, int]] = []
    start = 0
    for i, kind in enumerate((*kernels.kinds, None)):
        if kind not in _FUSIBLE:
            if i - start > 1:
                runs.append((start, i))
            start = i + 1
    return runs


def _slower_path(device: Device, kernels: KernelBatch) -> float:
    """Clocks per row over those of the path that uses every multiplier in each clock: arrays take several passes for wider formats."""
    every_clock = 2.0 * device.architecture["array_rows"] * device.architecture["array_columns"] * device.multiprocessors * device.clock_hz
    return every_clock / device.peak(kernels.arithmetic)
