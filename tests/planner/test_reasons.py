"""Reasons: what a long step spends its time on, the smallest change that fits, fixed fields that contradict."""

import pytest

import simtrain as st
from simtrain.core.errors import StrategyError
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import Strategy
from simtrain.planner.fitting import smallest_changes
from simtrain.planner.objectives import check_degrees
from simtrain.planner.why import bound_in_words, neighbours

BOX = "4x rtx-3090"


def test_parts_of_a_long_step_are_those_of_all_of_it():
    """The pipeline's bubble is a small part of a step of many micro-batches, whatever the shorter steps that are read show."""
    small = st.workload("gpt", layers=4, hidden=256, heads=4, vocabulary=512, seq_len=128)
    text = "pipeline=4,micro_batch=2,accumulation=64,precision=fp16-master"
    full = st.schedule(small, BOX, text, runtime="megatron")
    assert st.why(small, BOX, text, runtime="megatron").bound_by == bound_in_words(full.breakdown_s)


def test_a_single_change_that_fits_is_preferred_and_really_fits():
    how, work, where = Strategy.parse("data=4,micro_batch=32,accumulation=1"), st.workload("gpt2-small"), st.cluster(BOX)
    assert not st.schedule(work, where, how).fits
    found = smallest_changes(work, where, how, runtime("torch-eager"))
    assert found
    by_change = {
        ", ".join(f"{n}={getattr(s, n)}" for n in how.__dataclass_fields__ if getattr(s, n) != getattr(how, n)): s
        for _, s in neighbours(how, where, runtime("torch-eager"))
    }
    assert {w.change for w in found} <= set(by_change), "each is one choice away"
    for worth in found:
        read = st.schedule(work, where, by_change[worth.change])
        assert read.fits
        assert read.global_batch == how.global_batch
        assert read.step_time_s == pytest.approx(worth.step_time_s, rel=0.01)
    assert [w.step_time_s for w in found] == sorted(w.step_time_s for w in found)


def test_two_changes_where_one_is_not_enough():
    how, where = Strategy.parse("data=4,micro_batch=64"), st.cluster(BOX)
    found = smallest_changes(st.workload("gpt2-small"), where, how, runtime("torch-eager"))
    assert "micro_batch=16, accumulation=4" in [w.change for w in found]


def test_no_change_is_enough():
    how, where = Strategy.parse("data=4"), st.cluster(BOX)
    assert smallest_changes(st.workload("gpt3-175b"), where, how, runtime("torch-eager")) == ()


@pytest.mark.parametrize(
    ("fixed", "devices", "batch", "match"),
    [
        ({"tensor": 3}, 4, 64, "tensor=3 does not divide 4 devices: use 3 or 6 devices"),
        ({"tensor": 2, "data": 4}, 4, 64, "data=4 x tensor=2 = 8 does not divide 4 devices: use 8 devices"),
        ({"data": 2, "tensor": 1, "pipeline": 1, "context": 1}, 4, 64, "data=2 uses 2 of 4 devices: leave one degree free, or use 2"),
        ({"micro_batch": 5}, 4, 64, "micro_batch=5 does not divide a global batch of 64: use 60 or 65"),
        ({"data": 4, "accumulation": 32}, 4, 64, "data=4 x accumulation=32 does not divide a global batch of 64: use 128"),
    ],
)
def test_fixed_fields_that_contradict(fixed, devices, batch, match):
    with pytest.raises(StrategyError, match=match):
        check_degrees(fixed, devices, (batch,))


@pytest.mark.parametrize(
    ("fixed", "batch"), [({"tensor": 2, "data": 2, "micro_batch": 8, "accumulation": 4}, 64), ({"zero": 1, "checkpoint": "full"}, 8)]
)
def test_fixed_fields_that_go_together_are_found(fixed, batch):
    check_degrees(fixed, 4, (batch,))
    small = st.workload("gpt", layers=2, hidden=128, heads=4, vocabulary=512, seq_len=128)
    found = st.plan(small, BOX, batch, fixed=fixed, runtime="megatron")
    assert found.ranked
    for result in found.ranked:
        kept = Strategy.parse(result.strategy)
        assert {name: getattr(kept, name) for name in fixed} == fixed
        assert kept.global_batch == batch
        assert kept.ranks == 4
