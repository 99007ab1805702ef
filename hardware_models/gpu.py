"""The GPU compute model: kernel times from a data sheet, with constants shared by all devices of the vendor.

Matrix products: tiles of a library kernel fill the multiprocessors in waves; a wave runs at the sustained rate (peak, best share, power
cap) and moves operands that the wave does not find in L2 (`gpu_products`). Convolutions are such products over windows
(`gpu_convolution`). Everything else is traffic over the bandwidth that its memory technology
sustains, plus cache and instruction-rate terms where rows are read twice. Fused attention follows FlashAttention-2's measured rates.
Times are device times; what the host spends on launching is the runtime's. `gpu_constants` holds the numbers and their sources.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hardware_models.gpu_constants import GpuConstants, constants_of, origins
from hardware_models.gpu_convolution import convolution_times_s
from hardware_models.gpu_products import bandwidth_bytes_per_s, gemm_times_s, power_cap_flops, stream_s, sustained_flops, tensor_intensity
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind
from simtrain.cost.roofline import ceil_div, join, saturation, triangle_share

ATTENTION_BLOCK = 128
"""Queries (keys, in the backward pass) that one thread block of fused attention works on."""

FLASH_SINCE_YEAR = 2020
FLASH_LARGEST_HEAD = 256
"""FlashAttention-2 needs an Ampere or later device, 16-bit storage, and heads of at most this size."""

_GEMM = (OperatorKind.GEMM, OperatorKind.BATCHED_GEMM)
_ATTENTION = (OperatorKind.ATTENTION, OperatorKind.ATTENTION_BACKWARD)
_ROWS = (OperatorKind.NORM, OperatorKind.NORM_BACKWARD, OperatorKind.SOFTMAX, OperatorKind.SOFTMAX_BACKWARD)
_CONVOLUTION = (OperatorKind.CONVOLUTION, OperatorKind.CONVOLUTION_BACKWARD)
_BATCH_NORM = (OperatorKind.BATCH_NORM, OperatorKind.BATCH_NORM_BACKWARD)
_GATHER = (OperatorKind.EMBEDDING, OperatorKind.EMBEDDING_BACKWARD)


class GpuModel:
    """Prices kernels on GPUs; see the module's description.

    Attributes:
        name: As devices name it in `compute_model`.
    """

    name = "gpu"

    def kernel_times_s(self, device: Device, kernels: KernelBatch) -> FloatArray:
        """Returns the device time of each kernel.

        Raises:
            UnsupportedError: The device lacks the arithmetic path, or no constants hold for its vendor.
        """
        constants = constants_of(device)
        device.peak(kernels.arithmetic)
        streamed = stream_s(device, kernels.bytes_moved, kernels.element_bytes, constants)
        times = streamed + constants.launch_s * kernels.launches
        for kind in dict.fromkeys(kernels.kinds):
            chosen = kernels.mask(kind)
            if kind in _GATHER:
                times[chosen] += streamed[chosen] * (1.0 / constants.gather - 1.0)
            elif kind in _BATCH_NORM:
                # statistics are complete only after a pass over everything, so operands are read twice
                passes = constants.batch_norm_passes if kind is OperatorKind.BATCH_NORM else constants.batch_norm_backward_passes
                times[chosen] += streamed[chosen] * (passes - 1.0)
            elif kind in _CONVOLUTION:
                times[chosen] = convolution_times_s(device, kernels, chosen, constants, backward=kind is OperatorKind.CONVOLUTION_BACKWARD)
            elif kind in _GEMM:
                times[chosen] = gemm_times_s(device, kernels, chosen, constants, batched=kind is OperatorKind.BATCHED_GEMM)
            elif kind in _ATTENTION:
                times[chosen] = attention_times_s(device, kernels, chosen, constants, backward=kind is OperatorKind.ATTENTION_BACKWARD)
            elif kind in _ROWS:
                times[chosen] = row_times_s(device, kernels, chosen, constants, kind)
        return times

    def sources(self, device: Device) -> tuple[str, ...]:
        """Returns what the constants rest on, and which of them the device's profile replaces."""
        used = dict.fromkeys(f"{source} [{kind}]" for source, kind in origins(device).values())
        own = (f"{device.name}: measured {', '.join(sorted(device.profile))}",) if device.profile else ()
        return own + tuple(used)


def attention_times_s(
    device: Device, kernels: KernelBatch, chosen: NDArray[np.bool_], constants: GpuConstants, *, backward: bool
) -> FloatArray:
    """Times of fused attention: FlashAttention-2 where it runs, PyTorch's memory-efficient kernel elsewhere.

    The share of the peak grows with the head size, because the work of the softmax does not; the slower a device's tensor cores are
    against its other units, the less the softmax weighs. Causal kernels skip blocks above the diagonal.
    """
    queries, keys, head = kernels.m[chosen], kernels.n[chosen], kernels.k[chosen]
    causal = kernels.causal[chosen]
    sixteen_bit = kernels.arithmetic in (DType.BF16, DType.FP16)
    flash = (head <= FLASH_LARGEST_HEAD) & sixteen_bit & (device.year >= FLASH_SINCE_YEAR)
    # FlashAttention-2 issues warp-level instructions only, so newer tensor cores run at the rate of an A100's.
    warp_peak = constants.warp_tensor_ops * device.multiprocessors * device.clock_hz
    peak = min(device.peak(kernels.arithmetic), warp_peak) if sixteen_bit else device.peak(kernels.arithmetic)
    base = constants.attention_backward_base if backward else constants.attention_base
    softmax = constants.attention_backward_softmax if backward else constants.attention_softmax
    share = 1.0 / (base + softmax * tensor_intensity(device, kernels.arithmetic, constants) / head)
    share = share * np.where(flash, 1.0, constants.attention_unflashed) * np.where(causal, constants.attention_causal, 1.0)
    # Blocks are padded to full size and run in whole waves.
    padded_queries, padded_keys = (ceil_div(length, ATTENTION_BLOCK) * ATTENTION_BLOCK for length in (queries, keys))
    half = np.where(causal, constants.attention_half_length_causal, constants.attention_half_length)
    share = share * saturation(padded_keys, half)
    blocks = kernels.batch[chosen] * (padded_keys if backward else padded_queries) / ATTENTION_BLOCK
    fill = ceil_div(blocks, device.multiprocessors) * device.multiprocessors / blocks
    padding = padded_queries * padded_keys / (queries * keys)
    flops = kernels.flops[chosen] * padding * np.where(causal, triangle_share(padded_keys), 1.0)
    compute_s = flops * fill / (peak * share)
    memory_s = kernels.bytes_moved[chosen] / bandwidth_bytes_per_s(device, constants)
    return join(compute_s, memory_s, 2.0) + constants.launch_s * kernels.launches[chosen]


def row_times_s(device: Device, kernels: KernelBatch, chosen: NDArray[np.bool_], constants: GpuConstants, kind: OperatorKind) -> FloatArray:
    """Times of norms and softmaxes, which read each row twice: the second read is free while the rows in flight fit in L2.

    A backward kernel takes its measured multiple of the forward kernel on as many elements, and never less than its own traffic.
    """
    softmax = kind in (OperatorKind.SOFTMAX, OperatorKind.SOFTMAX_BACKWARD)
    backward = kind in (OperatorKind.SOFTMAX_BACKWARD, OperatorKind.NORM_BACKWARD)
    rows = constants.softmax_rows if softmax else constants.norm_rows
    per_clock = constants.softmax_per_clock if softmax else constants.norm_per_clock
    moved, width, length = kernels.bytes_moved[chosen], kernels.element_bytes[chosen], kernels.k[chosen]
    # Forward reads one tensor and writes one; backward reads two (output or input, and its gradient) and writes one.
    elements = moved / (width * (3.0 if backward else 2.0))
    bandwidth = bandwidth_bytes_per_s(device, constants)
    in_flight = device.multiprocessors * rows * length * width / device.cache_bytes
    missed = in_flight**2 / (1.0 + in_flight**2)
    traffic_s = 2.0 * elements * width / bandwidth
    times = traffic_s * (1.0 + 0.5 * missed) + elements / (device.multiprocessors * device.clock_hz * per_clock)
    if softmax:
        times = np.where(length <= constants.softmax_one_pass, stream_s(device, 2.0 * elements * width, width, constants), times)
    if backward:
        multiple = constants.softmax_backward if softmax else constants.norm_backward
        times = np.maximum(times * multiple, moved / bandwidth)
    return np.asarray(times + constants.launch_s * kernels.launches[chosen])


__all__ = ["GpuModel", "attention_times_s", "bandwidth_bytes_per_s", "power_cap_flops", "row_times_s", "sustained_flops"]
