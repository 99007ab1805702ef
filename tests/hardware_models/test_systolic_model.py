"""The systolic model: SCALE-Sim's cycle counts, physical bounds on any shape, and what arrays are known to do."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.catalog import devices
from hardware_models.systolic import Dataflow, SystolicModel, array_cycles, constants_of, preloaded_cycles
from simtrain.core.catalog import device
from simtrain.core.errors import CatalogError, InputError, UnsupportedError
from simtrain.core.kernels import KernelBatch
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind
from tests.hardware_models.kernel_builder import build

QUICK = settings(max_examples=60, deadline=None)
MODEL = SystolicModel()
CHIPS = [d.name for d in devices().values() if d.compute_model == "systolic"]
EXTENT = st.integers(1, 5000)

SCALE_SIM = {
    (128, 128, 128): (3039, 3551, 3551),
    (256, 256, 256): (20351, 22399, 22399),
    (300, 200, 100): (11339, 11031, 11759),
    (64, 512, 128): (6079, 10111, 4847),
}
"""Compute cycles of SCALE-Sim 3.0.0 on an array of 32 x 32 for (m, n, k), by dataflow: output, weight, input stationary."""


@pytest.mark.parametrize(("product", "cycles"), SCALE_SIM.items(), ids=str)
def test_cycles_are_those_of_scale_sim(product, cycles):
    assert tuple(array_cycles(*product, 32, 32, flow) for flow in Dataflow) == cycles


def test_an_empty_product_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        array_cycles(0, 8, 8, 32, 32)


def times(name, batch):
    return MODEL.kernel_times_s(device(name), batch)


@QUICK
@given(name=st.sampled_from(CHIPS), shape=st.tuples(st.integers(1, 64), EXTENT, EXTENT, EXTENT), batched=st.booleans())
def test_products_obey_the_roofline(name, shape, batched):
    chip = device(name)
    batch = build("batched_gemm" if batched else "gemm", [shape], DType.BF16)
    bound = max(batch.flops[0] / chip.peak(DType.BF16), batch.bytes_moved[0] / chip.memory.bandwidth_bytes_per_s)
    assert times(name, batch)[0] >= bound * 0.999


@QUICK
@given(name=st.sampled_from(CHIPS), shape=st.tuples(EXTENT, EXTENT, EXTENT))
def test_folds_overlap_but_never_beat_the_multipliers(name, shape):
    chip = device(name)
    m, n, k = (np.array([float(extent)]) for extent in shape)
    multipliers = chip.architecture["array_rows"] * chip.architecture["array_columns"] * chip.multiprocessors
    cycles = preloaded_cycles(chip, np.ones(1), m, n, k)[0]
    rows, columns = int(chip.architecture["array_rows"]), int(chip.architecture["array_columns"])
    serial = min(array_cycles(*shape, rows, columns, flow) for flow in (Dataflow.WEIGHT, Dataflow.INPUT))
    assert float((m * n * k)[0]) / multipliers <= cycles <= serial + 3 * rows + columns


def test_large_products_come_near_the_peak_and_small_heads_do_not():
    chip = device("tpu-v5e")
    large = build("gemm", [(1, 8192, 8192, 8192)], DType.BF16)
    assert 0.9 < large.flops[0] / times("tpu-v5e", large)[0] / chip.peak(DType.BF16) < 0.96
    wide, narrow = (build("attention", [(64, 2048, 2048, head)], DType.BF16) for head in (128, 64))
    assert times("tpu-v5e", wide)[0] < 1.1 * times("tpu-v5e", narrow)[0], "an array of 128 pads heads of 64 to its own edge"


@QUICK
@given(name=st.sampled_from(CHIPS), edge=st.integers(1, 40))
def test_padding_costs_what_the_padded_product_costs(name, edge):
    rows = int(device(name).architecture["array_rows"])
    short, full = (build("gemm", [(1, 4096, 4096, rows * edge - cut)], DType.BF16) for cut in (rows - 1, 0))
    assert times(name, short)[0] == pytest.approx(times(name, full)[0], rel=0.3)
    assert times(name, short)[0] <= times(name, full)[0] * 1.0001


def _chain(*batches):
    columns = ("batch", "m", "n", "k", "flops", "bytes_moved", "element_bytes", "launches", "causal")
    joined = {name: np.concatenate([getattr(b, name) for b in batches]) for name in columns}
    kinds = tuple(kind for b in batches for kind in b.kinds)
    return KernelBatch(names=tuple(str(i) for i in range(len(kinds))), kinds=kinds, arithmetic=DType.BF16, **joined)


def test_neighbours_bound_by_memory_are_fused():
    one = build("elementwise", [(1, 8192, 1, 8192)], DType.BF16)
    product = build("gemm", [(1, 8192, 8192, 128)], DType.BF16)
    alone = times("tpu-v5e", one).sum()
    assert times("tpu-v5e", _chain(one, one, one)).sum() == pytest.approx(alone * (1 + 2 / 3), rel=0.02)
    apart = times("tpu-v5e", _chain(one, product, one)).sum()
    assert apart == pytest.approx(2 * alone + times("tpu-v5e", product).sum(), rel=1e-9)


@pytest.mark.parametrize("kind", list(OperatorKind))
def test_every_operator_has_a_finite_price(kind):
    assert np.isfinite(times("tpu-v4", build(kind, [(4, 256, 256, 128)], DType.BF16))).all()


def test_what_is_missing_is_refused():
    chip = device("tpu-v4")
    with pytest.raises(UnsupportedError, match="has no fp16"):
        MODEL.kernel_times_s(chip, build("gemm", [(1, 8, 8, 8)], DType.FP16))
    with pytest.raises(CatalogError, match=r"needs array_columns in \[architecture\]"):
        constants_of(replace(chip, architecture={"array_rows": 128.0}))
    with pytest.raises(CatalogError, match="did you mean 'launch_s'"):
        constants_of(replace(chip, profile={"launchs": 1.0}))
    assert any("[assumption]" in source for source in MODEL.sources(chip))
