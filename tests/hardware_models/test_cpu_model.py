"""The CPU model: linear in its constants, calibrated or from the data sheet."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.cpu import CLASSES, DATA_SHEET_LAUNCH_S, CpuModel, calls_done, class_constants, flops_done, kernel_class
from hardware_models.measured import measured_class
from simtrain.core.catalog import device
from simtrain.core.errors import CatalogError, UnsupportedError
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind
from tests.hardware_models.kernel_builder import build

QUICK = settings(max_examples=60, deadline=None)
MODEL = CpuModel()
EXTENT = st.integers(min_value=1, max_value=4096)


def test_every_kind_has_a_class_and_every_class_a_kind():
    names = ("add", "gelu.backward", "mlp.gelu_tanh#2", "q.rotate")
    found = {kernel_class(kind, name) for kind in OperatorKind if kind is not OperatorKind.COLLECTIVE for name in names}
    assert found == set(CLASSES)


def test_only_words_make_an_activation():
    assert kernel_class(OperatorKind.ELEMENTWISE, "experts.add") == "elementwise"
    assert kernel_class(OperatorKind.ELEMENTWISE, "blocks.3.silu.backward") == "activation"
    assert kernel_class(OperatorKind.GEMM, "gelu") == "gemm"


def test_rotations_are_products_of_complex_numbers():
    assert {kernel_class(OperatorKind.ELEMENTWISE, n) for n in ("k.rotate.backward", "attention.mul_complex#2")} == {"complex"}
    assert kernel_class(OperatorKind.COPY, "clone_complex") == "elementwise"
    assert {measured_class(OperatorKind.ELEMENTWISE, "q.rotate"), measured_class(OperatorKind.CAST)} == {"elementwise"}


def test_a_profile_without_complex_products_prices_them_as_real_ones():
    cpu = replace(device("this-cpu"), profile={"elementwise.launch_s": 1e-6, "elementwise.bytes_per_s": 7e9})
    assert class_constants(cpu, "complex", DType.FP32) == class_constants(cpu, "elementwise", DType.FP32)
    own = replace(cpu, profile={**cpu.profile, "complex.launch_s": 2e-6, "complex.bytes_per_s": 3e9})
    assert class_constants(own, "complex", DType.BF16)[::2] == (2e-6, 3e9)


@QUICK
@given(
    kind=st.sampled_from(list(OperatorKind)),
    shape=st.tuples(st.integers(1, 32), EXTENT, EXTENT, EXTENT),
    name=st.sampled_from(["this-cpu", "5950x"]),
)
def test_data_sheet_times_obey_the_roofline(kind, shape, name):
    cpu = device(name)
    batch = build(kind, [shape])
    bound = max(batch.flops[0] / cpu.peak(DType.FP32), batch.bytes_moved[0] / cpu.memory.bandwidth_bytes_per_s)
    assert MODEL.kernel_times_s(cpu, batch)[0] >= bound + DATA_SHEET_LAUNCH_S


def test_time_is_the_sum_of_three_terms_from_the_profile():
    cpu = replace(device("this-cpu"), profile={"gemm.launch_s": 1e-5, "gemm.flops_per_s": 5e10, "gemm.bytes_per_s": 1e10})
    batch = build("gemm", [(1, 100, 200, 300)], launches=2)
    assert MODEL.kernel_times_s(cpu, batch)[0] == pytest.approx(2e-5 + batch.flops[0] / 5e10 + batch.bytes_moved[0] / 1e10)


def test_a_path_of_its_own_wins_over_the_scaled_fp32_rate():
    cpu = replace(device("this-cpu"), profile={"gemm.flops_per_s": 5e10})
    scaled = 5e10 * cpu.peak(DType.BF16) / cpu.peak(DType.FP32)
    assert class_constants(cpu, "gemm", DType.BF16)[1] == pytest.approx(scaled)
    own = replace(cpu, profile={**cpu.profile, "gemm.flops_per_s.bf16": 7e10})
    assert class_constants(own, "gemm", DType.BF16)[1] == 7e10
    assert class_constants(own, "gemm", DType.FP32)[1] == 5e10


def test_causal_attention_of_up_to_512_keys_computes_the_whole_square():
    for length in (96, 512):
        batch = build("attention", [(4, length, length, 64)], causal=True)
        assert flops_done(batch)[0] == pytest.approx(batch.flops[0])


def test_longer_causal_attention_leaves_out_blocks_above_the_diagonal():
    batch = build("attention", [(4, 1024, 1024, 64)], causal=True)
    assert flops_done(batch)[0] == pytest.approx(batch.flops[0] * 0.75)  # two of four 256-query blocks see half of the keys


def test_blocks_of_scores_are_set_up_one_by_one():
    batch = build("attention", [(6, 144, 144, 64), (6, 200, 200, 64), (6, 1024, 1024, 64)])
    assert calls_done(batch).tolist() == [6 * 5, 6 * 4, 6 * 8]


def test_copies_share_the_elementwise_constants_and_casts_do_without_their_own():
    cpu = replace(device("this-cpu"), profile={"elementwise.bytes_per_s": 1e9})
    cast, copy, add = (MODEL.kernel_times_s(cpu, build(k, [(1, 64, 1, 64)]))[0] for k in ("cast", "copy", "elementwise"))
    assert cast == copy == add
    own = replace(cpu, profile={**cpu.profile, "cast.launch_s": 1.0})
    assert MODEL.kernel_times_s(own, build("cast", [(1, 64, 1, 64)]))[0] > 1.0


def test_large_products_run_near_the_measured_rate():
    batch = build("gemm", [(1, 2048, 2048, 2048)])
    rate = (batch.flops / MODEL.kernel_times_s(device("this-cpu"), batch))[0]
    assert 80e9 < rate < 100e9


def test_misspelt_and_missing_constants_are_refused():
    batch = build("gemm", [(1, 8, 8, 8)])
    with pytest.raises(CatalogError, match=r"did you mean 'gemm\.launch_s'"):
        MODEL.kernel_times_s(replace(device("this-cpu"), profile={"gem.launch_s": 1e-6}), batch)
    with pytest.raises(UnsupportedError, match="has no tf32"):
        MODEL.kernel_times_s(device("this-cpu"), build("gemm", [(1, 8, 8, 8)], DType.TF32))


def test_sources_tell_calibrated_from_assumed():
    bare = device("this-cpu")
    assert "assumptions" in MODEL.sources(bare)[0]
    full = replace(bare, profile={f"{name}.launch_s": 1e-6 for name in CLASSES})
    assert "measured" in MODEL.sources(full)[0]
    assert len(MODEL.sources(full)) == 1


def test_empty_batches_are_fine():
    empty = build("gemm", [(1, 8, 8, 8)])
    empty = replace(
        empty, names=(), kinds=(), **{f: np.zeros(0) for f in ("batch", "m", "n", "k", "flops", "bytes_moved", "element_bytes")}
    )
    empty = replace(empty, launches=np.zeros(0, np.int64), causal=np.zeros(0, bool))
    assert MODEL.kernel_times_s(device("this-cpu"), empty).shape == (0,)
