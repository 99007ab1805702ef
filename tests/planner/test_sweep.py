"""Sweeps: the same rows in the same order whoever computes them; nothing finished is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pandas as pd
import pytest

import simtrain as st
from simtrain.core.errors import InputError, UnknownNameError
from simtrain.planner import sweep as sweeps
from simtrain.planner.cache import MARK

BOX = "2x v100-sxm2-16gb"
GRID = {"micro_batch": [1, 2, 4], "checkpoint": ["none", "full"], "precision": ["fp32", "fp16-amp"]}


def rows(folder, grid=GRID, **options):
    return st.sweep("gpt2-small", BOX, grid, strategy="data=2", cache=folder, **options)


@pytest.fixture(scope="module")
def expected():
    return st.sweep("gpt2-small", BOX, GRID, strategy="data=2", cache=False)


def test_a_grid_is_every_combination_in_order(expected):
    assert len(expected) == 12
    assert list(expected["point"]) == list(range(12))
    assert list(expected["micro_batch"]) == [1] * 4 + [2] * 4 + [4] * 4
    one = st.schedule("gpt2-small", BOX, "data=2,micro_batch=2,checkpoint=full,precision=fp16-amp")
    assert expected.loc[7, "step_time_s"] == one.step_time_s
    assert expected.loc[7, "memory.device_bytes"] == one.memory.device_bytes


def test_processes_and_the_cache_give_the_same_frame(tmp_path, expected):
    pd.testing.assert_frame_equal(rows(tmp_path, jobs=2), expected)
    seen = []
    pd.testing.assert_frame_equal(rows(tmp_path, progress=lambda *a: seen.append(a)), expected)
    assert seen == [(12, 12)], "everything was kept"


def test_what_cannot_be_is_a_row_with_its_reason(tmp_path):
    frame = rows(tmp_path, {"precision": ["fp32", "bf16-amp"], "data": ["2", "4"]})
    assert [bool(e) for e in frame["error"]] == [False, True, True, True]
    assert "needs 4 devices" in frame.loc[1, "error"]


class Failing(ThreadPoolExecutor):
    """Breaks down after a few points."""

    def submit(self, function, /, *args, **kwargs):
        self.given = getattr(self, "given", 0) + 1
        if self.given <= 5:
            return super().submit(function, *args, **kwargs)
        future = Future()
        future.set_exception(RuntimeError("the machine is gone"))
        return future


def test_a_sweep_that_stops_keeps_what_is_done_and_resumes(tmp_path, expected):
    with Failing(1) as pool, pytest.raises(sweeps.SweepStoppedError, match="of 12 points: they are kept"):
        rows(tmp_path, executor=pool)
    kept = len(list(tmp_path.rglob("??/*.json")))
    seen = []
    pd.testing.assert_frame_equal(rows(tmp_path, progress=lambda *a: seen.append(a)), expected)
    assert seen[0] == (kept, 12)


def test_an_interruption_keeps_what_is_done(tmp_path, monkeypatch):
    done = []

    def interrupted(question):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(question)
        return {"error": "", "n": len(done)}

    monkeypatch.setattr(sweeps, "run_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows(tmp_path)
    assert len(list(tmp_path.rglob("??/*.json"))) == 4


def test_a_process_that_dies_is_replaced(tmp_path, expected, monkeypatch):
    pools = []

    class Dying(sweeps.ProcessPoolExecutor):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pools.append(self)
            if len(pools) == 1:
                self.submit(os._exit, 1)

    monkeypatch.setattr(sweeps, "ProcessPoolExecutor", Dying)
    pd.testing.assert_frame_equal(rows(tmp_path, jobs=2), expected)
    assert len(pools) > 1


@pytest.fixture(scope="module")
def dask_cluster(tmp_path_factory):
    """A scheduler and two workers, each a process of its own on loopback."""
    pytest.importorskip("distributed")
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    common = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    processes = [subprocess.Popen([*words, "--scheduler-file", str(file)], **common)]
    until = time.monotonic() + 60
    while not file.exists() or not file.read_text().strip().endswith("}"):
        assert time.monotonic() < until, "the scheduler does not start"
        time.sleep(0.1)
    address = json.loads(file.read_text())["address"]
    words = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    processes += [subprocess.Popen([*words, "--host", "127.0.0.1"], **common) for _ in range(2)]
    yield address, processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_that_loses_a_worker_gives_the_same_frame(tmp_path, expected, dask_cluster):
    from distributed import Client

    address, processes = dask_cluster
    with Client(address, timeout=30, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
    seen = []

    def progress(done, total):
        seen.append(done)
        if done == 3:
            processes[1].send_signal(signal.SIGKILL)

    frame = rows(tmp_path, scheduler=address, progress=progress)
    pd.testing.assert_frame_equal(frame, expected)
    assert processes[1].wait(timeout=10) == -signal.SIGKILL
    assert seen[-1] == 12


def test_bad_questions(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="nothing to sweep"):
        rows(tmp_path, {})
    with pytest.raises(InputError, match="list of values"):
        rows(tmp_path, {"checkpoint": "none"})
    with pytest.raises(UnknownNameError, match="micro_batch"):
        rows(tmp_path, {"micro_bach": [1]})
    with pytest.raises(UnknownNameError, match="schedule"):
        rows(tmp_path, {"reader": ["shedule"]})
    with pytest.raises(InputError, match="one of jobs, scheduler and executor"):
        rows(tmp_path, jobs=2, scheduler="tcp://127.0.0.1:1")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no cache of sweeps"):
        rows(other)
    (other / MARK).write_text('{"format": 99}')
    with pytest.raises(InputError, match="another version of simtrain"):
        rows(other)
    local = st.workload("gpt", layers=1, hidden=64, heads=2, vocabulary=128, seq_len=32)
    with pytest.raises(InputError, match="by its name"):
        st.sweep(local, BOX, {"micro_batch": [1, 2]}, jobs=2, cache=False)


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("simtrain.planner.remote.ANSWER_S", 1)
    with pytest.raises(InputError, match="does not answer"):
        rows(tmp_path, scheduler="tcp://127.0.0.1:9")


def test_results_of_other_code_are_not_taken(tmp_path, monkeypatch):
    rows(tmp_path, {"micro_batch": [1]})
    monkeypatch.setattr("simtrain.planner.cache.fingerprint", lambda: "another")
    seen = []
    rows(tmp_path, {"micro_batch": [1]}, progress=lambda *a: seen.append(a))
    assert seen == [(0, 1), (1, 1)]
