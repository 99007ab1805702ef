"""The slowest of many devices: order statistics, what it slows and what not; it sets the pace where ranks are slowed one by one."""

from __future__ import annotations

from dataclasses import replace
from math import nan, pi, sqrt
from pathlib import Path

import numpy as np
import pytest

import simtrain as st
from hardware_models.schema import CLASS_SPREAD
from simtrain.core import catalog
from simtrain.core.errors import CatalogError, InputError
from simtrain.core.hardware import Cluster
from simtrain.core.precision import precision
from simtrain.core.runtimes import runtime
from simtrain.core.workload import OperatorKind
from simtrain.planner.arrays.compose import estimate_block
from simtrain.planner.arrays.tables import Tables
from simtrain.planner.space import Wishes, blocks
from simtrain.step.costs import Place, operators_cost
from simtrain.step.slowest import expected_largest, slowdown
from simtrain.step.specialize import concrete_layers

SIZES = {"layers": 8, "hidden": 1024, "heads": 16, "vocabulary": 8192, "ffn": 4096}
MEGATRON = runtime("megatron").with_(launch_s=2e-6)
"""So that devices set the pace of models as small as these."""

SPREAD = CLASS_SPREAD["gpu"][0]
EIGHT = "8x a100-sxm-80g"


def spread(cluster: str, value: float) -> Cluster:
    """A cluster whose devices differ by so much."""
    return catalog.cluster(cluster).with_speed_spread(value)


@pytest.mark.parametrize(("count", "largest"), [(1, 0.0), (2, 1 / sqrt(pi)), (3, 1.5 / sqrt(pi)), (100, 2.5076), (1000, 3.2414)])
def test_expected_largest_of_normal_numbers(count, largest):
    """Closed forms for two and three; 2.5076 and 3.2414 from tables of normal order statistics."""
    assert expected_largest(count) == pytest.approx(largest, abs=3e-3)


def test_it_is_what_drawing_devices_gives():
    device = replace(catalog.device("a100-sxm-80g"), speed_spread=0.02)
    drawn = 1 + 0.02 * np.random.default_rng(0).standard_normal((4000, 64)).max(axis=1)
    assert slowdown(device, 64) == pytest.approx(drawn.mean(), abs=3 * drawn.std() / sqrt(4000))
    assert slowdown(device, 1) == 1 == slowdown(replace(device, speed_spread=0.0), 64)


@pytest.mark.parametrize("value", [-0.01, 1.0, nan])
def test_a_spread_that_cannot_be_is_refused(value):
    with pytest.raises(InputError, match="speed_spread is a relative standard deviation"):
        st.estimate("gpt2-small", spread(EIGHT, value), "data=8,micro_batch=1")


def test_only_what_arithmetic_limits_is_slowed():
    work = st.workload("gpt", seq_len=1024, **SIZES)
    _, block, *_ = concrete_layers(work, precision("bf16-master"), MEGATRON)
    typical = Place(catalog.device("a100-sxm-80g"), 8, 1024, MEGATRON)
    slowest = replace(typical, slowdown=1.1)
    seen = set()
    for op in (*block.forward, *block.backward):
        now, then = (operators_cost([op], block, place).device_s for place in (typical, slowest))
        assert then == pytest.approx(1.1 * now) or then == now
        if then > now:
            seen.add(op.kind)
            assert op.flops.terms
    assert seen == {OperatorKind.GEMM, OperatorKind.ATTENTION, OperatorKind.ATTENTION_BACKWARD}

    wide = st.workload("gpt", seq_len=1024, **SIZES | {"hidden": 8192, "heads": 64, "ffn": 32768})
    _, block, *_ = concrete_layers(wide, precision("bf16-master"), MEGATRON)
    product = next(op for op in block.forward if op.kind is OperatorKind.GEMM)
    one = (operators_cost([product], block, replace(place, batch=1, sequence=1)).device_s for place in (typical, slowest))
    assert len(set(one)) == 1, "reading the weights limits the product of a matrix and a vector"


@pytest.mark.parametrize("strategy", ["data=8", "data=4,tensor=2", "data=2,tensor=4,sequence_parallel=true"])
def test_the_slowest_of_all_ranks_sets_the_pace(strategy):
    """Slowing each rank by its own factor is as slow as slowing all by the largest: in a layer among tensors, in a step among replicas."""
    work = st.workload("gpt", seq_len=1024, **SIZES)
    drawn = dict(enumerate((1 + 0.05 * np.abs(np.random.default_rng(1).standard_normal(8))).tolist()))
    ask = (work, spread(EIGHT, 0.0), f"{strategy},micro_batch=4,accumulation=2,precision=bf16-master")
    each = st.simulate(*ask, runtime=MEGATRON, stragglers=drawn).step_time_s
    every = st.simulate(*ask, runtime=MEGATRON, stragglers=dict.fromkeys(drawn, max(drawn.values()))).step_time_s
    assert each == pytest.approx(every, rel=2e-3)


def test_a_pipeline_is_no_slower_than_if_all_were_the_slowest():
    """Steady state at the pace of the slowest stage of all pipelines; fill and drain of the others at their own."""
    work = st.workload("gpt", seq_len=1024, **SIZES)
    drawn = dict(enumerate((1 + 0.05 * np.abs(np.random.default_rng(2).standard_normal(8))).tolist()))
    ask = (work, spread(EIGHT, 0.0), "data=2,pipeline=4,micro_batch=4,accumulation=32,precision=bf16-master")
    typical, each, every = (
        st.simulate(*ask, runtime=MEGATRON, stragglers=s).step_time_s for s in (None, drawn, dict.fromkeys(drawn, max(drawn.values())))
    )
    assert each <= every * (1 + 1e-9)
    assert each > typical


FORMS = [
    {"data": 8, "zero": 1},
    {"data": 2, "tensor": 4, "sequence_parallel": True, "zero": 1},
    {"data": 2, "pipeline": 4, "accumulation": 16, "zero": 0},
    {"data": 8, "zero": 3},
]


@pytest.mark.parametrize("form", FORMS)
def test_all_readers_and_the_arrays_slow_alike(form):
    work = st.workload("gpt", seq_len=1024, **SIZES)
    framework = runtime("fsdp2").with_(launch_s=2e-6) if form["zero"] == 3 else MEGATRON
    how = st.Strategy(micro_batch=4, precision="bf16-amp" if form["zero"] == 3 else "bf16-master", **form)
    found = []
    for value in (0.0, SPREAD):
        cluster = spread(EIGHT, value)
        times = [read(work, cluster, how, runtime=framework).step_time_s for read in (st.estimate, st.schedule, st.simulate)]
        fixed = {name: getattr(how, name) for name in (*form, "micro_batch", "precision")} | {"accumulation": how.accumulation}
        (block, *_), *_ = blocks(work, cluster, how.global_batch, [framework], Wishes(None, None, None, "adamw", 8, fixed))
        arrays = estimate_block(Tables(work, cluster), block)
        same = [i for i in np.flatnonzero(arrays.covered).tolist() if block.candidate(i).strategy == how]
        found.append([*times, *(arrays.step_time_s[i] for i in same)])
    assert len(found[0]) == 4
    gained = np.array(found[1]) / np.array(found[0]) - 1
    assert 0.005 < gained.min() <= gained.max() < slowdown(spread(EIGHT, SPREAD).devices[0], 8) - 1
    assert gained == pytest.approx(np.full(4, gained[1]), rel=0.1)


def test_a_result_says_so_and_names_the_source():
    many = st.estimate("gpt2-small", EIGHT, "data=8,micro_batch=4,precision=bf16-amp")
    (said,) = [a for a in many.assumptions if "slowest of 8" in a]
    assert f"{SPREAD * expected_largest(8):.1%}" in said
    assert any("Not All GPUs Are Created Equal" in s for s in many.sources)
    one = st.estimate("gpt2-small", EIGHT, "micro_batch=4,precision=bf16-amp")
    assert not any("slowest" in a for a in one.assumptions)
    zero = st.estimate("gpt2-small", spread(EIGHT, 0.0), "data=8,micro_batch=4,precision=bf16-amp")
    assert zero.step_time_s < many.step_time_s
    assert not any("slowest" in a for a in zero.assumptions)


def test_a_device_file_states_its_own(tmp_path: Path):
    text = (Path(__file__).parents[2] / "hardware_models" / "devices" / "a100-sxm4-80gb.toml").read_text()

    def read(value: str):
        path = tmp_path / "mine.toml"
        path.write_text(
            text.replace("\n[sources]", f'speed_spread = ["{value}", "measurement", "own"]\n\n[sources]\nown = "all boards, timed"')
        )
        return catalog.device(str(path))

    assert read("0").speed_spread == 0
    assert read("0.01").provenance["speed_spread"].source == "all boards, timed"
    with pytest.raises(CatalogError, match=r"must be at most 0\.5"):
        read("1.7")
    assert catalog.device("a100-sxm-80g").speed_spread == SPREAD
    assert catalog.device("tpu-v4").speed_spread == 0, "nothing was measured"


def test_what_is_left_out_of_pipelines_is_said():
    """Eight stages of one device each wait for none, yet one of them is the slowest of eight."""
    asked = st.Strategy(pipeline=8, accumulation=16, precision="bf16-master")
    said = [a for a in st.estimate("gpt2-small", EIGHT, asked).assumptions if "slowest device of all" in a]
    assert said == [
        f"that any of 8 stages may hold the slowest device of all is left out: where they are equal, their products may take up to "
        f"{SPREAD * expected_largest(8):.1%} longer"
    ]
    assert not [a for a in st.estimate("gpt2-small", spread(EIGHT, 0.0), asked).assumptions if "slowest" in a]
