import dataclasses
import json
from collections import defaultdict

import pytest

from simtrain import report, schedule
from simtrain.core.errors import InputError


def _load(result, tmp_path):
    report.save_trace(result, tmp_path / "step.json")
    return json.loads((tmp_path / "step.json").read_text())


@pytest.fixture(params=["by hand", "scheduled"])
def any_result(request, result):
    if request.param == "by hand":
        return result
    return schedule("gpt2-small", "4x rtx-3090", "data=4,micro_batch=4,accumulation=2,precision=fp16-amp")


def test_every_event_is_a_valid_trace_event(any_result, tmp_path):
    document = _load(any_result, tmp_path)
    assert document["displayTimeUnit"] == "ms"
    for event in document["traceEvents"]:
        assert event["ph"] in ("X", "M", "C")
        assert isinstance(event["pid"], int)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= 0
            assert isinstance(event["tid"], int)
            assert event["name"]


def test_every_process_and_thread_has_a_name(any_result, tmp_path):
    events = _load(any_result, tmp_path)["traceEvents"]
    processes = {e["pid"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {e["pid"] for e in events} == processes
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == threads


def test_busy_times_are_those_of_the_result(any_result, tmp_path):
    events = _load(any_result, tmp_path)["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    busy_us = defaultdict(float)
    for e in events:
        if e["ph"] == "X":
            busy_us[names[e["pid"], e["tid"]]] += e["dur"]
    assert busy_us["compute"] / 1e6 == pytest.approx(any_result.busy_s["compute"], rel=1e-9)


def test_memory_is_a_counter_in_bytes_whose_peak_is_allocated(any_result, tmp_path):
    counters = [e for e in _load(any_result, tmp_path)["traceEvents"] if e["ph"] == "C"]
    assert len(counters) == len(any_result.memory.timeline.moments)
    assert max(sum(e["args"].values()) for e in counters) == pytest.approx(any_result.memory.allocated_bytes, rel=1e-9)


def test_rank_classes_are_processes(result):
    other = tuple(dataclasses.replace(e, rank_class="slow") for e in result.events)
    events = report.trace_events(dataclasses.replace(result, events=result.events + other))
    named = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert named.keys() == {"rank class all ranks", "rank class slow"}
    assert {e["pid"] for e in events if e["ph"] == "C"} == {named["rank class all ranks"]}


def test_without_events_there_is_no_trace(result, tmp_path):
    with pytest.raises(InputError, match="keeps no events to trace"):
        report.save_trace(dataclasses.replace(result, events=(), reader="estimate"), tmp_path / "step.json")


def test_a_file_that_cannot_be_written_is_named(result, tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*nowhere.*step\.json: No such file or directory"):
        report.save_trace(result, tmp_path / "nowhere" / "step.json")
