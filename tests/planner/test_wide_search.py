"""Searches over all degrees: bounds are bounds, what is passed over is no better, constraints hold, reasons are right."""

import itertools
import re

import pytest

import simtrain as st
from simtrain.core.errors import InputError, StrategyError, UnknownNameError
from simtrain.core.runtimes import runtime as find_runtime
from simtrain.planner import rounds
from simtrain.planner.objectives import Judge, Weights
from simtrain.planner.screen import REFUSALS, Screen, shortened
from simtrain.planner.space import Wishes, candidates, default_runtimes

NODES = "16x a100-sxm-80g"
GPT = {"layers": 8, "hidden": 1024, "heads": 16, "vocabulary": 8192, "seq_len": 512}


@pytest.fixture(scope="module")
def small():
    return st.workload("gpt", **GPT)


@pytest.fixture(scope="module")
def space(small):
    cluster = st.cluster(NODES)
    return cluster, candidates(small, cluster, 64, default_runtimes(cluster, small), Wishes(None, None, None, "adamw", 16, {}))[0]


def test_the_space_has_every_degree_once(space):
    _, found = space
    assert len(set(found)) == len(found)
    assert {c.strategy.tensor for c in found} == {1, 2, 4, 8}, "tensor parallelism stays in a node"
    assert {c.strategy.pipeline for c in found} == {1, 2, 4, 8}, "as many stages as there are blocks"
    assert all(c.strategy.ranks == 16 and c.strategy.global_batch == 64 for c in found)
    assert {c.runtime.name for c in found} == {"torch-eager", "megatron", "fsdp2"}


def test_the_bound_lies_below_the_schedule(small, space):
    cluster, found = space
    screen = Screen(small, cluster)
    for candidate in found[:: max(len(found) // 15, 1)]:
        try:
            exact = st.schedule(small, cluster, candidate.strategy, runtime=candidate.runtime).step_time_s
        except REFUSALS:
            continue
        assert screen.bound_s(candidate) <= exact * (1 + 1e-9), str(candidate.strategy)


def test_projections_and_quick_memory_agree_with_the_whole(small, space):
    cluster, found = space
    screen = Screen(small, cluster)
    long = [c for c in found if c.strategy.pipeline > 1 and c.strategy.accumulation > 4 * c.strategy.pipeline]
    for candidate in long[:: max(len(long) // 8, 1)]:
        whole = st.estimate(small, cluster, candidate.strategy, runtime=candidate.runtime)
        slow_hosts = whole.breakdown_s["host"] > 0.02 * whole.step_time_s  # they fall behind in long steps, not in the shorter ones
        assert screen.projected_s(candidate) == pytest.approx(whole.step_time_s, rel=0.1 if slow_hosts else 0.02)
        assert screen.projected_s(candidate) >= screen.bound_s(candidate)
        assert screen.memory(candidate).device_bytes <= whole.memory.device_bytes * (1 + 1e-9)
        assert screen.confirmed(candidate).device_bytes == pytest.approx(whole.memory.device_bytes, rel=1e-9)
        short = st.estimate(small, cluster, shortened(candidate.strategy), runtime=candidate.runtime)
        assert short.memory.device_bytes == pytest.approx(whole.memory.device_bytes, rel=1e-9)


def test_nothing_that_was_passed_over_is_better(small, space, monkeypatch):
    cluster, _ = space
    monkeypatch.setattr(rounds, "EXHAUSTIVE", 0)
    quick = st.plan(small, cluster, 64, runtime="megatron", fixed={"tensor": 2, "zero": 1})
    assert quick.complete
    assert quick.passed_over
    assert quick.considered == len(quick.ranked) + len(quick.failed) + quick.passed_over
    monkeypatch.setattr(rounds, "EXHAUSTIVE", 10**6)
    monkeypatch.setattr(rounds, "SHORT_STEPS", 10**9)
    every = st.plan(small, cluster, 64, runtime="megatron", fixed={"tensor": 2, "zero": 1})
    assert not every.passed_over
    assert quick.best.strategy == every.best.strategy
    assert quick.best.step_time_s == pytest.approx(every.best.step_time_s, rel=1e-9)


def test_fixed_fields_hold(small):
    found = st.plan(small, NODES, 64, fixed={"tensor": "4", "micro_batch": 2}, runtime="megatron")
    assert found.ranked
    assert all("tensor=4" in r.strategy and "micro_batch=2" in r.strategy for r in found.ranked)


def test_devices_can_be_left_unused(small):
    found = st.plan(small, NODES, 64, devices=8, fixed={"micro_batch": 4}, runtime="megatron")
    assert {r.devices for r in found.ranked} == {8}


def test_limits_hold_and_are_counted(small):
    question = {"precisions": ["fp32"], "runtime": "torch-eager"}
    free = st.plan(small, "4x rtx-3090", 16, **question)
    margin = 1 - free.best.memory.device_bytes / free.best.memory.capacity_bytes + 0.01
    tight = st.plan(small, "4x rtx-3090", 16, **question, limits=st.Limits(memory_margin=margin))
    assert tight.best.strategy != free.best.strategy
    assert all(r.memory.device_bytes <= r.memory.capacity_bytes * (1 - margin) for r in tight.ranked)
    dear = st.plan(small, "4x rtx-3090", 16, **question, limits=st.Limits(budget_usd=1e-9, tokens=1e12))
    assert not dear.ranked
    assert any("costs more than" in f.reason for f in dear.failed)
    weak = st.plan(small, "4x rtx-3090", 16, **question, limits=st.Limits(power_w=1.0))
    assert any("draws more than" in f.reason for f in weak.failed)


def test_a_front_holds_what_nothing_beats(small):
    found = st.plan(small, "4x rtx-3090", 16, objective=["throughput", "memory"], runtime="torch-eager")
    assert len(found.front) > 1
    for a, b in itertools.permutations(found.front, 2):
        assert a.samples_per_s > b.samples_per_s or a.memory.device_bytes < b.memory.device_bytes
    for result in found.ranked:
        assert any(f.samples_per_s >= result.samples_per_s and f.memory.device_bytes <= result.memory.device_bytes for f in found.front)


def test_the_balanced_score_weighs_its_parts(small):
    question = {"precisions": ["fp32"], "zeros": [0], "objective": "balanced", "runtime": "torch-eager"}
    least = st.plan(small, "4x rtx-3090", [8, 16], **question, weights={"throughput": 0, "memory": 1, "convergence": 0})
    assert least.best.memory.device_bytes == min(r.memory.device_bytes for r in least.ranked)
    found = st.plan(small, "4x rtx-3090", [8, 16], **question, weights={"throughput": 0, "memory": 0, "convergence": 1})
    assert found.best.global_batch == 8, "smaller batches need fewer samples"
    scores = Judge(("balanced",), Weights()).scores(found.ranked)
    assert all(0 < s <= 1 for s in scores)


def test_reasons_of_a_step_bound_by_compute(small):
    found = st.why(small, "1x rtx-3090", "micro_batch=16,precision=fp32")
    assert found.resources[0].change == "10 % more compute peak"
    assert 0 < found.resources[0].gain <= 0.1 + 1e-9
    again = st.schedule(small, "1x rtx-3090", "micro_batch=8,accumulation=2,precision=fp32")
    (worth,) = (k for k in found.knobs if k.change == "micro_batch=8, accumulation=2")
    assert worth.step_time_s == again.step_time_s


def test_reasons_name_the_host_where_it_is_slow(small):
    slow = find_runtime("torch-eager").with_(launch_s=1e-3)
    found = st.why(small, "1x rtx-3090", "micro_batch=1", runtime=slow)
    assert found.resources[0].change == "10 % more host launch rate"
    assert found.resources[0].gain == pytest.approx(0.1, rel=0.02)


def test_what_fits_nowhere_says_what_would_make_it_fit():
    found = st.plan("llama3-8b", "4x rtx-3090", 16, precisions=["fp32"], explain=True)
    assert found.best is None
    assert any("over by" in line or "it fits" in line for line in found.advice)


def test_a_comparison_sums_to_the_difference(small):
    a, b = (st.schedule(small, "4x rtx-3090", f"data=4,micro_batch={m}") for m in (1, 4))
    found = st.compare(a, b)
    assert sum(found.time_s.values()) == pytest.approx(b.step_time_s - a.step_time_s)
    assert sum(found.memory_bytes.values()) == pytest.approx(b.memory.allocated_bytes - a.memory.allocated_bytes)
    assert "activation +" in str(found)


def test_a_search_that_takes_too_long_says_so(small):
    found = st.plan(small, NODES, 64, patience_s=0.0)
    assert not found.complete
    assert found.unread
    said = next(note for note in found.notes if "NOT COMPLETE" in note)
    assert f"{found.unread:,} of {found.considered:,}" in said
    by_runtime = re.findall(r"([\w-]+) ([\d,]+) of ([\d,]+)(?=[,)])", said)
    assert {name for name, _, _ in by_runtime} == {"torch-eager", "fsdp2", "megatron"}
    assert sum(int(left.replace(",", "")) for _, left, _ in by_runtime) == found.unread
    assert "--patience" in said


def test_bad_questions(small):
    with pytest.raises(StrategyError, match="did you mean 'tensor'"):
        st.plan(small, NODES, 64, fixed={"tensr": 8})
    with pytest.raises(StrategyError, match="tensor=3"):
        st.plan(small, NODES, 64, fixed={"tensor": 3})
    with pytest.raises(InputError, match="give 1 to 16"):
        st.plan(small, NODES, 64, devices=17)
    with pytest.raises(InputError, match="tokens"):
        st.Limits(budget_usd=100)
    with pytest.raises(InputError, match="share from 0"):
        st.Limits(memory_margin=1.5)
    with pytest.raises(UnknownNameError, match="weight"):
        st.plan(small, NODES, 64, weights={"speed": 1})
    with pytest.raises(InputError, match="above zero"):
        Weights(0, 0, 0)
    with pytest.raises(InputError, match="at least one global batch"):
        st.plan(small, NODES, [])
    with pytest.raises(InputError, match="at least one objective"):
        st.plan(small, NODES, 64, objective=[])


@pytest.mark.parametrize("choice", [{"fixed": {"checkpoint": "optimal"}}, {"precisions": ("adaptive:0.05",)}])
def test_choices_that_the_engine_settles_are_screened_too(choice):
    """The same best as by reading every one: spaces too large for that are screened."""
    work = st.workload("gpt", layers=4, hidden=512, heads=8, vocabulary=2048, seq_len=256)
    question = (work, "4x rtx-3090", [2**k for k in range(6, 13)])
    found = st.plan(*question, runtime="deepspeed" if "fixed" in choice else "torch-eager", zeros=(0, 1), devices=4, **choice)
    assert found.best is not None
    assert found.notes[0].startswith(("bounds", "0 of")) or "estimated as arrays" in found.notes[0]
    again = st.schedule(work, "4x rtx-3090", found.best.strategy, runtime=found.best.runtime)
    assert again.step_time_s == pytest.approx(found.best.step_time_s, rel=0.02)
