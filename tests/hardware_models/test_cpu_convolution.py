"""Convolutions on a CPU: small batches of 1x1 windows read their filter for every sample."""

from dataclasses import replace

import numpy as np
import pytest

from hardware_models.cpu import CpuModel, bytes_done
from simtrain.core.catalog import device
from simtrain.core.precision import DType
from tests.hardware_models.test_gpu_convolution import convolution

SHAPE = (512, 2048, 3, 1, 1)
FILTER_BYTES = 4 * 512 * 2048


def extra(samples, shape=SHAPE, arithmetic=DType.FP32, **options):
    kernels = replace(convolution(shape, samples, arithmetic, **options), samples=samples)
    return (bytes_done(kernels) - kernels.bytes_moved)[0]


def test_filters_are_read_once_per_sample_and_product_below_16_samples():
    assert extra(8) == 7 * FILTER_BYTES
    assert extra(8, backward=True) == 2 * 7 * FILTER_BYTES
    assert extra(1) == extra(16) == 0


@pytest.mark.parametrize("shape", [(64, 64, 8, 3, 1), (64, 64, 8, 1, 2)])
def test_other_windows_go_to_the_library(shape):
    assert extra(8, shape) == extra(8, arithmetic=DType.BF16) == 0


def test_time_falls_per_sample_where_the_library_takes_over():
    times = [CpuModel().kernel_times_s(device("cpu-core"), replace(convolution(SHAPE, n, DType.FP32), samples=n))[0] / n for n in (15, 16)]
    assert times[1] < 0.8 * times[0]
    assert np.isfinite(times).all()
