"""Real PyTorch training steps, tiny ones: the ledger equals the allocator, and measuring works."""

import json

import pytest

pytest.importorskip("torch")

from simtrain.core import catalog
from simtrain.step.predict import schedule
from validation import compare
from validation.backend import CpuBackend
from validation.features import CPU_RUNTIME, workload_of
from validation.measure import environment, measure, quietest_core
from validation.measurement import Measurement, Settings
from validation.steps import TrainingStep, gpt
from validation.worker import memory_of_step

TINY = (
    gpt("tiny-adamw", (2, 64, 4, 300), (2, 32), "adamw"),
    gpt("tiny-sgd", (3, 48, 3, 500), (3, 40), "sgd"),
    gpt("tiny-checkpoint", (4, 64, 2, 200), (4, 32), "adamw", "checkpoint=full"),
    gpt("tiny-every-two", (4, 64, 2, 200), (4, 32), "sgd", "checkpoint=every:2"),
    gpt("tiny-accumulation", (2, 64, 4, 300), (2, 32), "adamw", "accumulation=3"),
    gpt("tiny-head", (1, 32, 2, 4000), (2, 64), "adamw"),
)
SETTINGS = Settings(warmup_steps=1, timed_steps=3, operator_steps=1, memory=False)


@pytest.fixture(scope="module")
def peaks():
    from validation.measure import run_worker

    return run_worker(TINY, Settings(), memory=True)


@pytest.mark.parametrize("step", TINY, ids=lambda s: s.name)
def test_predicted_peak_memory_equals_the_allocators(step, peaks):
    _, predicted = compare.predict(step, catalog.device("cpu-core"))
    assert predicted == pytest.approx(peaks[step.name]["peak_memory_bytes"], rel=0.002)


@pytest.fixture(scope="module")
def measured():
    return measure(TINY[:1], SETTINGS)[0]


def test_a_measurement_has_times_and_provenance(measured):
    assert measured.step_time_s > 0
    assert 0 < measured.class_times_s["gemm"] < 10 * measured.step_time_s
    assert measured.class_times_s["optimizer"] > 0
    assert measured.class_calls["gemm"] == 3 * (4 * 2 + 1)
    assert measured.environment is not None
    assert measured.environment.torch_version == environment().torch_version
    assert measured.environment.allocator["MALLOC_MMAP_MAX_"] == "0"


def test_a_measurement_round_trips_through_json(measured):
    assert Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_buffers_are_reused_from_step_to_step():
    step = gpt("big-logits", (1, 64, 2, 9000), (4, 256), "sgd")
    pages_of_logits = 4 * 256 * 9000 * 4 / 4096
    faults = measure((step,), Settings(warmup_steps=5, timed_steps=3, memory=False))[0].page_faults_per_step
    assert faults < 0.2 * pages_of_logits


def test_a_core_is_chosen_among_the_allowed_ones():
    core = quietest_core(interval_s=0.01)
    assert core is None or core >= 0


def test_composed_rms_norms_keep_what_the_ledger_says():
    options = {"layers": 4, "hidden": 128, "heads": 4, "vocabulary": 300, "kv_heads": 2, "ffn": 256}
    step = TrainingStep("llama", "llama3-8b", 64, "micro_batch=4,optimizer=sgd", options)
    measured = memory_of_step(step, CpuBackend())["peak_memory_bytes"]
    result = schedule(workload_of(step), compare.single_core(catalog.device("cpu-core")), step.parsed(), runtime=CPU_RUNTIME)
    assert result.memory.allocated_bytes == pytest.approx(measured, rel=1e-5)
    assert not any("RMS norms" in line for line in result.assumptions)
