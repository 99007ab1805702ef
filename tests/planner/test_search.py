"""The plan ranks what fits, and says of the rest what would make it fit."""

import pytest

import simtrain as st
from simtrain.core.errors import InputError, StrategyError, UnknownNameError
from simtrain.planner.search import OBJECTIVES
from simtrain.planner.space import Wishes, candidates, check_fixed, default_runtimes

BOX = "4x rtx-3090"


@pytest.fixture(scope="module")
def found():
    return st.plan("gpt2-medium", BOX, 64, precisions=["fp32", "bf16-amp"])


def test_every_combination_is_accounted_for(found):
    assert found.considered == len(found.ranked) + len(found.failed)
    assert found.considered == 5 * 2 * 4 * 2  # divisors of 16, precisions, checkpointing, ZeRO


def test_the_best_comes_first(found):
    rates = [r.samples_per_s for r in found.ranked]
    assert rates == sorted(rates, reverse=True)
    assert found.best is found.ranked[0]
    assert all(r.fits and r.global_batch == 64 for r in found.ranked)


def test_a_failure_says_by_how_much_and_what_would_fit(found):
    assert found.failed
    for failure in found.failed:
        assert failure.over_bytes > 0
        assert failure.term
        assert st.schedule("gpt2-medium", BOX, failure.smallest_change).fits
        assert not st.schedule("gpt2-medium", BOX, failure.strategy).fits


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_each_objective_picks_its_own_minimum(objective):
    small = st.workload("gpt", layers=2, hidden=128, heads=4, vocabulary=512, seq_len=128)
    result = st.plan(small, BOX, 32, objective=objective, precisions=["fp32", "bf16-amp"], checkpoints=["none", "full"])
    key = OBJECTIVES[objective]
    assert key(result.ranked[0]) == min(key(r) for r in result.ranked)


def test_nothing_fits():
    result = st.plan("gpt3-175b", BOX, 4, precisions=["bf16"])
    assert result.best is None
    assert all(not f.smallest_change for f in result.failed)


def test_progress_counts_to_the_end():
    seen = []
    st.plan(st.workload("gpt", layers=1, hidden=64, heads=2, vocabulary=128, seq_len=32), BOX, 8, progress=lambda a, b: seen.append((a, b)))
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_default_precisions_are_those_the_devices_have():
    small = st.workload("gpt", layers=1, hidden=64, heads=2, vocabulary=128, seq_len=32)
    result = st.plan(small, "2x v100-sxm2-16gb", 4)
    found = {next((p for p in r.strategy.split(",") if p.startswith("precision")), "precision=fp32") for r in result.ranked}
    assert found == {"precision=fp32", "precision=fp16-amp"}


def test_bad_questions():
    with pytest.raises(StrategyError, match="use 252 or 256"):
        st.plan("gpt2-small", BOX, 255)
    with pytest.raises(UnknownNameError, match="throughput"):
        st.plan("gpt2-small", BOX, 256, objective="throughputt")
    with pytest.raises(InputError, match="nothing to try"):
        st.plan("gpt2-small", BOX, 256, precisions=[])
    with pytest.raises(StrategyError, match="at least 1"):
        st.plan("gpt2-small", BOX, 0)


@pytest.mark.parametrize("fixed", [{"offload": "optimizer"}, {"compression": "topk:0.01"}, {"low_communication": "local-sgd:8"}])
def test_fixed_fields_are_kept_by_every_candidate(fixed):
    cluster = st.cluster(BOX)
    known = check_fixed(fixed)
    wishes = Wishes(None, None, None, "adamw", cluster.size, known)
    found, _ = candidates(st.workload("gpt2-medium"), cluster, 64, default_runtimes(cluster), wishes)
    assert all(getattr(c.strategy, name) == value for c in found for name, value in known.items())
