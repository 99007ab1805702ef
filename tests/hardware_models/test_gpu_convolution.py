"""Convolutions on GPUs: physical bounds, and what layouts, windows and algorithms change."""

import numpy as np
import pytest

from hardware_models.gpu import GpuModel
from simtrain.core.catalog import device
from simtrain.core.kernels import KernelBatch
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind, Window

MODEL = GpuModel()
SHAPES = [(64, 64, 56, 3, 1), (256, 64, 56, 1, 1), (128, 128, 28, 3, 2), (512, 2048, 7, 1, 1), (256, 512, 28, 1, 2), (8, 1000, 1, 1, 1)]
"""Channels in and out, edge of what is written, edge and stride of the filter."""


def convolution(shape, batch=64, arithmetic=DType.FP16, *, backward=False, products=2, channels_last=True):
    inner, outer, edge, window, stride = shape
    size = arithmetic.size_bytes
    m, n, k = float(batch * edge**2), float(outer), float(inner * window**2)
    image = batch * inner * (edge * stride) ** 2
    moved = image + m * n + k * n
    one = np.ones(1)
    return KernelBatch(
        names=("c",),
        kinds=(OperatorKind.CONVOLUTION_BACKWARD if backward else OperatorKind.CONVOLUTION,),
        batch=one,
        m=m * one,
        n=n * one,
        k=k * one,
        flops=2 * m * n * k * one * (products if backward else 1),
        bytes_moved=size * moved * one * (1.5 if backward else 1),
        element_bytes=size * one,
        launches=np.ones(1, dtype=np.int64),
        causal=np.zeros(1, dtype=bool),
        arithmetic=arithmetic,
        windows=(Window(window, stride, channels_last),),
    )


def time_s(name, *args, **options):
    return float(MODEL.kernel_times_s(device(name), convolution(*args, **options))[0])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("arithmetic", [DType.FP16, DType.TF32])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_faster_than_the_roofline(shape, arithmetic, backward):
    for name in ("rtx-3090", "a100", "h100", "v100-sxm2-16gb"):
        gpu, batch = device(name), convolution(shape, arithmetic=arithmetic, backward=backward)
        if arithmetic not in gpu.peak_flops:
            continue
        bound = max(batch.flops[0] / gpu.peak(arithmetic), batch.bytes_moved[0] / gpu.memory.bandwidth_bytes_per_s)
        assert MODEL.kernel_times_s(gpu, batch)[0] >= bound


def test_large_convolutions_reach_most_of_the_peak_and_thin_ones_the_bandwidth():
    large, thin = convolution((1024, 1024, 28, 3, 1), 256), convolution((64, 64, 112, 1, 1), 256)
    gpu = device("a100")
    assert large.flops[0] / MODEL.kernel_times_s(gpu, large)[0] > 0.6 * gpu.peak(DType.FP16)
    assert thin.bytes_moved[0] / MODEL.kernel_times_s(gpu, thin)[0] > 0.5 * gpu.memory.bandwidth_bytes_per_s


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_channels_first_cost_conversions_on_tensor_cores_only(shape):
    plain = shape[3:] == (1, 1)  # windows of one pixel are products of channels in either layout
    for path, differs in ((DType.FP16, not plain), (DType.TF32, not plain), (DType.FP32, False)):
        last, first = (time_s("a100", shape, arithmetic=path, channels_last=c) for c in (True, False))
        assert (first > 1.05 * last) == differs
        assert first >= last


@pytest.mark.parametrize("path", [DType.FP16, DType.FP32])
def test_both_gradients_take_about_twice_the_forward_time(path):
    forward = time_s("a100", SHAPES[0], 256, path)
    assert 1.7 * forward < time_s("a100", SHAPES[0], 256, path, backward=True) < 3.2 * forward


@pytest.mark.parametrize("path", [DType.FP16, DType.FP32])
def test_the_first_layer_has_no_gradient_of_its_images(path):
    both, one = (time_s("a100", (3, 64, 112, 7, 2), 128, path, backward=True, products=p) for p in (2, 1))
    assert one < 0.75 * both


def test_winograd_saves_time_for_3x3_windows_of_stride_1_only():
    gpu = device("v100-sxm2-16gb")
    for shape, saves in (((256, 256, 28, 3, 1), True), ((256, 256, 28, 3, 2), False), ((256, 256, 28, 1, 1), False)):
        batch = convolution(shape, 64, DType.FP32)
        direct = batch.flops[0] / (gpu.peak(DType.FP32) * 0.85)
        assert (MODEL.kernel_times_s(gpu, batch)[0] < direct) == saves


def test_windows_of_one_pixel_need_no_conversion_going_forward_only():
    one = SHAPES[1]
    assert time_s("rtx-3090", one, channels_last=False) == time_s("rtx-3090", one)
    assert time_s("rtx-3090", one, backward=True, channels_last=False) > time_s("rtx-3090", one, backward=True)


def input_gradient_s(name, shape, batch, arithmetic):
    """What the gradient of the input adds to that of the filter."""
    both, filter_alone = (time_s(name, shape, batch, arithmetic, backward=True, products=p) for p in (2, 1))
    return both - filter_alone


def test_a_stride_rounds_the_taps_of_its_phases_up():
    """5 x 5 at stride 2: four phases of 3 x 3 taps, 36 for 25; DeepBench measures 1.40 times the forward pass on a V100."""
    shape = (64, 128, 175, 5, 2)
    ratio = input_gradient_s("v100", shape, 16, DType.FP32) / time_s("v100", shape, 16, DType.FP32)
    assert ratio == pytest.approx(36 / 25, rel=0.03)
    unit = (64, 128, 175, 5, 1)
    assert input_gradient_s("v100", unit, 16, DType.FP32) / time_s("v100", unit, 16, DType.FP32) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(("inner", "outer", "edge", "batches"), [(512, 512, 7, (8, 16)), (256, 256, 14, (8, 16)), (512, 2048, 7, (8, 16))])
def test_few_pixels_leave_multiprocessors_idle_where_the_contraction_is_not_split(inner, outer, edge, batches):
    """DeepBench: twice the samples cost the input's gradient nothing (0.134 and 0.135, 0.072 and 0.072, 0.062 and 0.068 ms)."""
    window = 1 if outer > inner else 3
    small, large = (input_gradient_s("v100", (inner, outer, edge, window, 1), b, DType.FP16) for b in batches)
    assert small <= large < 1.25 * small
