"""Searches whose screens know tensors alone: what the allocator's segments decide is read, and what fails by them is replaced."""

from dataclasses import replace

import pytest

import simtrain as st
from simtrain.core.runtimes import runtime as find_runtime
from simtrain.planner import rounds
from simtrain.planner.arrays import finalists
from simtrain.planner.fitting import smallest_changes
from simtrain.step import results

MEGATRON = find_runtime("megatron")
FIXED = {"tensor": 2, "zero": 1, "schedule": "1f1b", "chunks": 0}
QUESTION = {"fixed": FIXED, "precisions": ("bf16-master",), "checkpoints": ("none", "full")}


@pytest.fixture(scope="module")
def work():
    return st.workload("gpt", layers=8, hidden=512, heads=8, vocabulary=4096, seq_len=512)


def machines(capacity_bytes=None):
    """Four cards with so much memory."""
    cluster = st.cluster("4x a100-sxm-80g")
    if capacity_bytes is None:
        return cluster
    (node,) = cluster.nodes
    device = replace(node.devices[0], memory=replace(node.devices[0].memory, capacity_bytes=int(capacity_bytes)))
    return replace(cluster, nodes=(replace(node, devices=(device,) * len(node.devices)),))


@pytest.fixture(scope="module")
def free(work):
    """The best where memory is plenty."""
    return st.plan(work, machines(), 32, runtime=MEGATRON, **QUESTION).best


def replay_as(monkeypatch, share_of):
    """Segments of some share of the tensors, by strategy."""
    replay = results.block_peaks

    def wasteful(setting, *rest):
        peaks = replay(setting, *rest)
        return peaks and replace(peaks, reserved_bytes=peaks.asked_bytes * share_of(setting.strategy))

    monkeypatch.setattr(results, "block_peaks", wasteful)


@pytest.fixture
def searched(work, monkeypatch):
    """A plan as screens find it with few finalists, and one that has read everything."""

    def both(cluster, **question):
        asked = {"runtime": MEGATRON, **QUESTION, **question}
        for module, name, value in (
            *((rounds, "EXHAUSTIVE", 0), (rounds, "KEPT", 2), (rounds, "SCHEDULED", 1)),
            *((finalists, "FINALISTS", 2), (finalists, "OF_EACH", 1)),
        ):
            monkeypatch.setattr(module, name, value)
        quick = st.plan(work, cluster, 32, **asked)
        monkeypatch.setattr(rounds, "EXHAUSTIVE", 10**6)
        monkeypatch.setattr(rounds, "SHORT_STEPS", 10**9)
        every = st.plan(work, cluster, 32, **asked)
        for found in (quick, every):
            assert found.complete
            assert found.considered == len(found.ranked) + len(found.failed) + found.unlisted + found.passed_over
        assert not every.passed_over
        return quick, every

    return both


def same_best(quick, every):
    if every.best is None:
        return quick.best is None
    return quick.best is not None and quick.best.strategy == every.best.strategy


def test_what_one_factor_would_keep_out_is_found(work, free, searched):
    replayed = free.memory
    by_factor = MEGATRON.with_(reserved_factor=replayed.reserved_bytes / replayed.allocated_bytes + 0.1, replays_blocks=False)
    counted = st.schedule(work, machines(), free.strategy, runtime=by_factor).memory
    tight = machines((replayed.device_bytes + counted.device_bytes) / 2)
    quick, every = searched(tight)
    assert same_best(quick, every)
    assert quick.best.strategy == free.strategy
    factor, _ = searched(tight, runtime=by_factor)
    assert factor.best.strategy != free.strategy


@pytest.mark.parametrize("least", [0.7, 0.8, 0.97])
def test_what_fits_by_tensors_alone_is_replaced(work, free, searched, monkeypatch, least):
    """Segments of half as much again for some strategies: the best by tensors fails and says so, the next takes its place."""
    replay_as(monkeypatch, lambda s: 1.02 if (s.micro_batch.bit_length() + s.pipeline.bit_length()) % 2 else 1.5)  # the best: 1.5
    wanted = st.schedule(work, machines(), free.strategy, runtime=MEGATRON).memory
    quick, every = searched(machines(wanted.device_bytes * least))
    assert same_best(quick, every)
    beside = [f for f in quick.failed if "segments beside tensors" in f.reason]
    assert beside
    assert all(f.over_bytes > 0 and f.term for f in beside)


def test_where_segments_let_nothing_fit_everything_says_so(searched, monkeypatch):
    replay_as(monkeypatch, lambda _: 1000)
    quick, every = searched(machines())
    assert quick.best is None
    assert every.best is None
    assert len(quick.failed) + quick.unlisted == quick.considered


def test_a_search_without_time_to_replace_says_so(work, monkeypatch):
    replay_as(monkeypatch, lambda _: 1000)
    monkeypatch.setattr(rounds, "EXHAUSTIVE", 0)
    monkeypatch.setattr(rounds.Search, "_over_time", lambda self: True)
    found = st.plan(work, machines(), 32, runtime=MEGATRON, **QUESTION)
    assert found.best is None
    if found.considered > len(found.failed):
        assert not found.complete
        assert any("NOT COMPLETE" in note for note in found.notes)
    assert found.considered == len(found.failed) + found.unlisted + found.passed_over + found.unread


def test_a_front_of_what_is_replayed_holds(free, searched):
    quick, _ = searched(machines(free.memory.device_bytes * 0.9), objective=("throughput", "memory"))
    assert quick.front
    assert all(r.fits for r in quick.ranked)


def test_changes_that_are_said_to_fit_do(work):
    """By the replay, as whoever makes the change reads it."""
    strategy = st.Strategy.parse("data=4,micro_batch=8,precision=bf16-master")
    now = st.schedule(work, machines(), strategy, runtime=MEGATRON).memory
    tight = machines(now.device_bytes * 0.98)
    assert not st.schedule(work, tight, strategy, runtime=MEGATRON).fits
    changes = smallest_changes(work, tight, strategy, MEGATRON)
    assert changes
    for change in changes:
        fields = dict(part.split("=") for part in change.change.split(", "))
        changed = st.Strategy.parse(",".join(f"{k}={v}" for k, v in {**_fields(strategy), **fields}.items()))
        assert st.schedule(work, tight, changed, runtime=MEGATRON).fits, change.change


def _fields(strategy):
    return {"data": strategy.data, "micro_batch": strategy.micro_batch, "precision": strategy.precision}


def test_what_goes_by_one_factor_says_so(work):
    """Allocations, and what stages of a pipeline recompute."""
    allocated = st.allocate(work, machines(), 32, runtime=MEGATRON, tensors=(2,), micro_batches=(4,), zeros=(0,), sequences=(True,))
    assert any("1.05 times what tensors take" in line for line in allocated.assumptions)
    strategy = "pipeline=4,accumulation=4,micro_batch=8,precision=bf16-master,checkpoint=optimal"
    chosen = st.schedule(work, machines(), strategy, runtime=MEGATRON)
    assert any("1.05 times the tensors" in line for line in chosen.assumptions)
    eager = st.schedule(work, machines(), strategy, runtime="torch-eager")
    assert not any("times the tensors" in line for line in eager.assumptions)
