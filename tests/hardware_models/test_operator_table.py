"""The operator table: exact where it was measured, silent far away, smooth between."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.cpu import CpuModel
from hardware_models.operator_table import SHRINKAGE, coordinates, correction, label
from simtrain.core.catalog import device
from simtrain.core.precision import DType
from tests.hardware_models.kernel_builder import build

MODEL = CpuModel()


def entry(kernels, ratio):
    return np.column_stack([coordinates(kernels), np.full(len(kernels), np.log(ratio))])


def test_a_cliff_is_kept_where_it_was_measured_and_nowhere_else():
    here, near, far = (build("gemm", [(1, m, 2048, 512)]) for m in (32, 36, 3200))
    bare = device("cpu-core")
    taught = replace(bare, operator_table={"gemm": entry(here, 4.0)})
    factor = [float(MODEL.kernel_times_s(taught, k)[0] / MODEL.kernel_times_s(bare, k)[0]) for k in (here, near, far)]
    assert factor[0] == pytest.approx(4.0 ** (1 / (1 + SHRINKAGE)))
    assert 2.0 < factor[1] < factor[0]
    assert factor[2] == pytest.approx(1.0)


def test_other_classes_and_other_paths_are_left_alone():
    kernels = build("gemm", [(1, 64, 64, 64)])
    bare = device("cpu-core")
    taught = replace(bare, operator_table={label("gemm", DType.BF16): entry(kernels, 3.0), "norm": entry(kernels, 3.0)})
    assert MODEL.kernel_times_s(taught, kernels) == MODEL.kernel_times_s(bare, kernels)


@settings(max_examples=60, deadline=None)
@given(
    ratios=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=8),
    sizes=st.lists(st.floats(0.0, 12.0), min_size=1, max_size=8),
    at=st.floats(0.0, 12.0),
)
def test_a_correction_never_leaves_the_range_of_what_was_measured(ratios, sizes, at):
    count = min(len(ratios), len(sizes))
    entries = np.column_stack([np.zeros((count, 4)), sizes[:count], np.log(ratios[:count])])
    found = correction(entries, np.array([[0.0, 0.0, 0.0, 0.0, at]]))[0]
    assert min(*ratios[:count], 1.0) - 1e-9 <= found <= max(*ratios[:count], 1.0) + 1e-9
