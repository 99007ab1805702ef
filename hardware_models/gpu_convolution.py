"""Convolutions on GPUs: implicit matrix products over windows, and Winograd's algorithm without tensor cores.

A convolution is the product of (pixels written) x (channels in times window) with (channels in times window) x (channels out); the left
operand is never formed, so the image is read at its stored size. Its gradients are products of the same work: that of the input has a
row for every pixel read, that of the filter contracts over all pixels and is split into many parts to fill the device.

Tensor cores take images with their channels last. Where they come channels first, cuDNN converts the images of every product and
converts the result back, each a read and a write (NVIDIA, Convolutional Layers User's Guide, section on tensor layouts).
Windows of one pixel are spared that going forward: they are plain products of channels in either layout, and on a V100 they run faster than
conversions alone could (DeepBench, `validation/published/convolutions.toml`).

The gradient of a strided convolution's input falls apart into one product for each phase of the stride, and each takes the window's taps
rounded up to whole strides: a window of 5 at stride 2 has phases of 3 x 3 taps, 36 in all instead of 25.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from hardware_models.gpu_constants import GpuConstants
from hardware_models.gpu_products import (
    BATCHED_SPLITS,
    BATCHED_TILES,
    LINEAR_SPLITS,
    TENSOR_PATHS,
    Product,
    linear_tiles,
    misalignment,
    product_times_s,
    stream_s,
    sustained_flops,
)
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType
from simtrain.core.workload import Window
from simtrain.cost.roofline import join, soft_minimum

FILTER_SPLITS = (1, 4, 16, 64)
"""Assumption: parts of the contraction over pixels that the filter's gradient is split into; its result is too small to fill a device."""

INPUT_TILES = ((256, 128), (128, 256), (128, 128), (256, 64))
"""Tiles of the input's gradient in 8 and 16 bits; its contraction is not split, so that few pixels leave multiprocessors idle.

Chosen among six sets on every other shape of DeepBench's V100 table; on the other half the mean logarithmic error of these gradients falls
from 0.53 to 0.28. In TF32, of which there is no table, tiles and splits are those of other products.
"""

WINOGRAD_PRODUCTS = 36
WINOGRAD_PIXELS = 16
"""F(4x4, 3x3): tiles of 16 pixels, each transformed into 36 values that are multiplied apart (Lavin and Gray 2016)."""


def convolution_times_s(
    device: Device, kernels: KernelBatch, chosen: NDArray[np.bool_], constants: GpuConstants, *, backward: bool
) -> FloatArray:
    """Times of convolutions or of their gradients; a network's first layer has no gradient of its input."""
    if kernels.arithmetic in TENSOR_PATHS:
        best = _on_tensor_cores(device, kernels, chosen, constants, backward=backward)
    else:
        best = _on_vector_units(device, kernels, chosen, constants, backward=backward)
    floor_s = np.asarray(constants.launch_s * kernels.launches[chosen], dtype=np.float64)
    return join(best, floor_s, constants.gemm_floor_exponent)


def _on_tensor_cores(
    device: Device, kernels: KernelBatch, chosen: NDArray[np.bool_], constants: GpuConstants, *, backward: bool
) -> FloatArray:
    groups, m, n, k = kernels.batch[chosen], kernels.m[chosen], kernels.n[chosen], kernels.k[chosen]
    width = kernels.element_bytes[chosen]
    taps, area, stored, first = _windows(kernels, chosen)
    inner = k / taps
    image = m * area * inner
    rate = sustained_flops(device, kernels.arithmetic, constants)
    slowdown = misalignment(device, kernels.arithmetic, (inner, n, n), width, constants)
    tiles = linear_tiles(kernels.arithmetic)
    moved = width * groups * (m * stored * inner + m * n + k * n)
    share = constants.convolution_converted_tf32 if kernels.arithmetic is DType.TF32 else 1.0
    converted_s = np.where(first, share * stream_s(device, 2.0 * width * groups * (image + m * n), width, constants), 0.0)
    if not backward:
        product = Product(groups, m, n, k, image, k * n, width, np.maximum(moved, kernels.bytes_moved[chosen]), slowdown)
        forward = product_times_s(
            device, product, constants, arithmetic=kernels.arithmetic, rate_flops=rate, tiles=tiles, splits=LINEAR_SPLITS
        )
        # a window of one pixel at stride 1 is a plain product of channels in either layout
        return forward + np.where((taps == 1) & (stored == 1), 0.0, converted_s)
    to_filter = Product(groups, n, k, m, m * n, image, width, moved, slowdown)
    to_input = Product(groups, m * area, inner, n * taps / area, m * n, k * n, width, moved, slowdown)
    filter_s = product_times_s(
        device, to_filter, constants, arithmetic=kernels.arithmetic, rate_flops=rate, tiles=tiles, splits=FILTER_SPLITS
    )
    whole = kernels.arithmetic is not DType.TF32
    input_s = product_times_s(
        device,
        to_input,
        constants,
        arithmetic=kernels.arithmetic,
        rate_flops=rate,
        tiles=INPUT_TILES if whole else tiles,
        splits=(1,) if whole else LINEAR_SPLITS,
    )
    return filter_s + converted_s + np.where(_has_input_gradient(kernels, chosen), input_s + converted_s, 0.0)


def _on_vector_units(
    device: Device, kernels: KernelBatch, chosen: NDArray[np.bool_], constants: GpuConstants, *, backward: bool
) -> FloatArray:
    """The better of a direct product and Winograd's algorithm; gradients are multiples of the forward time, as measured.

    A filter of one pixel is a plain product of matrices and priced as such.
    """
    groups, m, n, k = kernels.batch[chosen], kernels.m[chosen], kernels.n[chosen], kernels.k[chosen]
    width = kernels.element_bytes[chosen]
    taps, area, stored, _ = _windows(kernels, chosen)
    inner, image = k / taps, m * area * k / taps
    bandwidth = device.memory.bandwidth_bytes_per_s
    rate = sustained_flops(device, kernels.arithmetic, constants) / constants.gemm_efficiency_simt * constants.convolution_efficiency_simt
    none, one = np.zeros_like(m), np.ones_like(m)
    activations, filters = width * groups * (image + m * n), width * groups * k * n
    plain = Product(groups, m, n, k, image, k * n, width, activations + filters, one)
    priced = partial(
        product_times_s,
        device,
        constants=constants,
        arithmetic=kernels.arithmetic,
        rate_flops=rate,
        tiles=linear_tiles(kernels.arithmetic),
        splits=LINEAR_SPLITS,
    )
    point = priced(plain)
    direct = priced(Product(groups, m, n, k, none, none, none, none, one))
    direct = direct + constants.convolution_direct_traffic * (activations + filters) / bandwidth
    tiles_of_image = np.ceil(m / WINOGRAD_PIXELS)
    winograd = product_times_s(
        device,
        Product(WINOGRAD_PRODUCTS * groups, tiles_of_image, n, inner, none, none, none, none, one),
        constants,
        arithmetic=kernels.arithmetic,
        rate_flops=rate,
        tiles=BATCHED_TILES,
        splits=BATCHED_SPLITS,
    )
    winograd = winograd + (constants.winograd_activations * activations + constants.winograd_filters * filters) / bandwidth
    times = np.where(taps == 1, point, np.where((taps == 9) & (area == 1), soft_minimum(direct, winograd, 4.0), direct))
    if not backward:
        return times
    to_filter = np.where(taps == 1, constants.convolution_to_filter_point, constants.convolution_to_filter)
    to_input = np.where(
        (stored > 1) & (taps == 1), constants.convolution_to_input_strided, constants.convolution_to_input * _phase_taps(taps, stored)
    )
    return np.asarray(times * (to_filter + np.where(_has_input_gradient(kernels, chosen), to_input, 0.0)))


def _windows(kernels: KernelBatch, chosen: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray, FloatArray, NDArray[np.bool_]]:
    """Returns taps of each filter, pixels read and pixels stored per pixel written, and whether channels come first."""
    windows = [kernels.windows[i] if kernels.windows else Window() for i in np.flatnonzero(chosen)]
    taps = np.array([w.edge**2 for w in windows], dtype=np.float64)
    area = np.array([min(w.stride, w.edge) ** 2 for w in windows], dtype=np.float64)
    stored = np.array([w.stride**2 for w in windows], dtype=np.float64)
    return taps, area, stored, np.array([not w.channels_last for w in windows], dtype=bool)


def _phase_taps(taps: FloatArray, stored: FloatArray) -> FloatArray:
    """Taps of all phases of a stride, each rounded up to the largest phase, over the taps of the window."""
    edge, stride = np.sqrt(taps), np.minimum(np.sqrt(stored), np.sqrt(taps))
    return np.asarray((np.ceil(edge / stride) * stride / edge) ** 2)


def _has_input_gradient(kernels: KernelBatch, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    one = 2.0 * kernels.batch[chosen] * kernels.m[chosen] * kernels.n[chosen] * kernels.k[chosen]
    return np.asarray(kernels.flops[chosen] > 1.5 * one)
