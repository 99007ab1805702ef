"""Measuring on CUDA without a GPU: everything but the CUDA calls, with an implementation of them on the processor."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch

from hardware_models.cpu import kernel_class
from hardware_models.measured import HOST_FACTOR, data_sheet_times_s
from simtrain.cli.main import main
from simtrain.core import catalog
from simtrain.core.errors import CatalogError, InputError, UnsupportedError
from simtrain.core.precision import DType, precision
from simtrain.core.runtimes import runtime
from validation import compare, machine_profile, probe
from validation.backend import CudaBackend, backend
from validation.calibrate_gpu import data_sheet_of, describe, launches, profile_from_gpu, step_operators
from validation.features import runtime_of, workload_of
from validation.gpu_steps import GPU_CALIBRATION_STEPS, GPU_MEMORY_STEPS, GPU_TEST_STEPS
from validation.measurement import Environment, Measurement, Settings
from validation.memory_worker import Trainer
from validation.operator_times import ClassTimes
from validation.steps import gpt, image_model
from validation.training import Training
from validation.worker import memory_of_step, time_step

H200 = {"name": "NVIDIA H200", "multiprocessors": 132, "memory_bytes": 150_754_820_096, "driver_version": "570.1", "cuda_version": "12.8"}
HERE = Environment("Test CPU", 16, "2.13.0+cu130", "3.12", "Linux", "2026-01-01T00:00:00+00:00", 0.0, {}, 2**37, H200)
SHEET = "h200-sxm5-141gb"
FACTORS = {"gemm": 1.2, "attention": 0.9, "attention_backward": 1.4, "optimizer": 1.1, "elementwise": 0.8}
HOST = 0.6


class FakeEvent:
    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class FakeCuda:
    """The functions of `torch.cuda` that are used, on the processor; every call is noted."""

    def __init__(self):
        self.calls = []

    def Event(self, *, enable_timing):
        assert enable_timing
        return FakeEvent()

    def get_device_properties(self, index):
        assert index == 0
        return SimpleNamespace(name=H200["name"], multi_processor_count=132, total_memory=H200["memory_bytes"])

    def max_memory_allocated(self):
        return 5000

    def max_memory_reserved(self):
        return 8000

    def __getattr__(self, name):
        assert name in ("init", "synchronize", "empty_cache", "reset_peak_memory_stats")
        return lambda: self.calls.append(name)


def profiled_on_the_processor(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run()
    return recorded.events(), lambda event: event.cpu_time_total


@pytest.fixture
def fake():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield CudaBackend(FakeCuda(), "cpu", profiled_on_the_processor)
    torch.set_float32_matmul_precision(flags[0])
    torch.backends.cudnn.allow_tf32 = flags[1]
    torch.set_num_threads(threads)


TINY = (
    gpt("tiny", (2, 64, 4, 300), (2, 32), "adamw"),
    gpt("tiny-bf16", (2, 64, 4, 300), (2, 32), "sgd", "precision=bf16-amp"),
    image_model("tiny-resnet", "resnet18-cifar", 2, "sgd-momentum"),
)


@pytest.mark.parametrize("step", TINY, ids=lambda s: s.name)
def test_the_profilers_tree_tells_the_operators_that_the_clock_sees(step, fake):
    training = Training(step, fake)
    training.step()
    clock, tree = ClassTimes(kernel_class), ClassTimes(kernel_class)
    clock.step(training.passes, training.update)
    fake.operator_times(training, tree)
    merged = clock.calls()
    merged["activation"] = merged.get("activation", 0) + merged.pop("activation_tanh", 0)
    merged["elementwise"] = merged.get("elementwise", 0) + merged.pop("cast", 0)
    assert {name: n for name, n in tree.calls().items() if n} == {name: n for name, n in merged.items() if n}
    assert len(tree.rows[0]["optimizer"]) == 1
    assert all(seconds > 0 for seconds in tree.seconds().values())


def test_a_step_is_timed_by_events_without_waiting(fake):
    answer = time_step(TINY[0], Settings(warmup_steps=1, timed_steps=3, operator_steps=2, device="cuda"), fake)
    assert 0 < answer["step_time_s"] < 10
    assert len(answer["call_times_s"]["gemm"]) == 27
    # once after the timed steps, and around each of the profiled ones
    assert fake.api.calls.count("synchronize") == 1 + 2 * 2


def test_peaks_come_from_the_allocator(fake):
    assert memory_of_step(TINY[0], fake) == {"peak_memory_bytes": 5000, "reserved_memory_bytes": 8000}
    assert fake.api.calls[:2] == ["empty_cache", "reset_peak_memory_stats"]
    assert Trainer(TINY[0], "full", fake).peak_bytes(others=1200) == 3800


@pytest.mark.parametrize(
    ("name", "products", "convolutions"), [("fp32", "highest", False), ("tf32", "high", True), ("bf16-amp", "highest", False)]
)
def test_tf32_is_on_only_when_asked_for(fake, name, products, convolutions):
    fake.autocast(name)
    assert torch.get_float32_matmul_precision() == products
    assert torch.backends.cudnn.allow_tf32 is convolutions


def test_half_precision_trains_under_loss_scaling(fake):
    training = Training(gpt("half", (1, 32, 2, 64), (1, 16), "sgd", "precision=fp16-amp"), fake)
    training.step()
    assert training._scaler is not None
    with pytest.raises(UnsupportedError, match="tf32"):
        fake.autocast("fp8")


def test_the_device_is_described(fake):
    assert fake.describe().items() >= {"name": "NVIDIA H200", "multiprocessors": 132}.items()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_cuda_without_one_says_what_to_do(capsys):
    with pytest.raises(InputError, match="--device cpu"):
        backend("cuda")
    for command in (["calibrate"], ["calibrate", "--probe", "gpt2-small"], ["validate", "torch"], ["validate", "memory"]):
        assert main([*command, "--device", "cuda"]) == 2
        assert "there is no CUDA device" in "".join(capsys.readouterr())
    with pytest.raises(InputError, match="cpu or cuda"):
        backend("tpu")


def synthetic(step, scale=1.0):
    """A step on a GPU whose classes take known factors over the data sheet; where kernels are too small, the host decides."""
    measured = Measurement(step, 1.0, 0.0, 0.0, 0, {}, {}, 0.0, environment=HERE)
    calls = {
        name: [FACTORS.get(name, 1.0) * scale * float(row[0]) for row in asked.work]
        for name, asked in step_operators(measured, catalog.device(SHEET)).items()
    }
    sums = {name: sum(times) for name, times in calls.items()}
    host_s = launches(measured) * runtime("torch-eager").host.launch_s * HOST
    return replace(measured, step_time_s=max(sum(sums.values()), host_s), class_times_s=sums, call_times_s=calls)


@pytest.fixture(scope="module")
def profile():
    plain = [s for s in GPU_CALIBRATION_STEPS if s.parsed().checkpoint == "none"]
    return profile_from_gpu([synthetic(s) for s in plain], SHEET)


def test_a_gpu_of_known_factors_is_recovered(profile):
    for name, factor in FACTORS.items():
        assert profile.constants[f"{name}.factor"] == pytest.approx(factor, rel=1e-6)
        if name != "optimizer":
            assert profile.constants[f"{name}.factor.bf16"] == pytest.approx(factor, rel=1e-6)
    assert profile.constants[HOST_FACTOR] == pytest.approx(HOST, rel=1e-6)
    assert profile.step_error < 0.03


def test_steps_of_that_gpu_are_predicted(profile):
    device = profile.device()
    for step in GPU_TEST_STEPS:
        plan = step.parsed()
        if plan.checkpoint == "none" and plan.accumulation == 1:
            assert compare.predict(step, device)[0] == pytest.approx(synthetic(step).step_time_s, rel=0.05), step.name


def test_the_calibrated_gpu_says_what_it_rests_on(profile, tmp_path):
    device = profile.device()
    assert device.memory.capacity_bytes == H200["memory_bytes"]
    assert "NVIDIA H200" in device.provenance["profile"].source
    assert "driver 570.1" in describe(profile)
    path = tmp_path / "cuda.json"
    machine_profile.save(profile, path)
    assert machine_profile.load(path, HERE) == profile
    named = catalog.device(f"profile:{path}")
    assert any("NVIDIA H200" in line for line in named.assumptions)
    with pytest.raises(InputError, match="simtrain calibrate"):
        machine_profile.load(path, replace(HERE, accelerator=H200 | {"name": "Tesla T4"}))
    sources = catalog.compute_model("measured").sources(device)
    assert "gemm.bf16" in sources[0]


def test_a_class_that_was_not_measured_keeps_its_data_sheet_time(profile):
    bare = replace(profile, constants={}, operator_table={}).device()
    step = GPU_TEST_STEPS[0]
    assert compare.predict(step, bare)[0] == pytest.approx(compare.predict(step, catalog.device(SHEET))[0], rel=1e-9)
    wrong = replace(profile, constants={"gem.factor": 1.0}).device()
    with pytest.raises(CatalogError, match=r"did you mean 'gemm\.factor"):
        compare.predict(step, wrong)


def test_a_probe_on_a_gpu_learns_what_single_shapes_take(profile):
    step = gpt("probed", (12, 896, 14, 28000), (8, 448), "adamw", "precision=bf16-amp")
    slower = synthetic(step, scale=2.0)
    folded, covered = probe.fold(profile, workload_of(step), slower)
    assert covered == pytest.approx(1.0, abs=0.05)
    before, after = (compare.predict(step, p.device())[0] / slower.step_time_s for p in (profile, folded))
    assert before == pytest.approx(0.5, abs=0.05)
    assert after == pytest.approx(1.0, abs=0.1)


def test_the_hosts_time_per_launch_reaches_predictions(profile):
    step, device = GPU_CALIBRATION_STEPS[-1], profile.device()
    slow = replace(device, profile=dict(device.profile) | {HOST_FACTOR: 2 * HOST})
    assert compare.predict(step, slow)[0] == pytest.approx(2 * compare.predict(step, device)[0], rel=0.05)


@pytest.mark.parametrize(
    ("name", "multiprocessors", "gib", "sheet"),
    [
        ("NVIDIA H200", 132, 139.8, "H200-SXM5-141GB"),
        ("NVIDIA A100 80GB PCIe", 108, 79.3, "A100-PCIe-80GB"),
        ("NVIDIA A100-SXM4-80GB", 108, 79.3, "A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 3090", 82, 23.7, "RTX3090-24GB"),
        ("NVIDIA A10G", 80, 22.3, "A10G-24GB"),
        ("Tesla T4", 40, 14.7, "T4-16GB"),
    ],
)
def test_a_gpu_is_found_in_the_catalog(name, multiprocessors, gib, sheet):
    assert data_sheet_of({"name": name, "multiprocessors": multiprocessors, "memory_bytes": int(gib * 2**30)}) == sheet


def test_a_gpu_that_is_not_in_the_catalog_needs_a_data_sheet():
    with pytest.raises(InputError, match="--data-sheet"):
        data_sheet_of({"name": "NVIDIA H200 MIG 1g.18gb", "multiprocessors": 16, "memory_bytes": 18 * 2**30})


def test_lists_share_no_sizes_and_fit_small_gpus():
    def sizes(steps):
        gpts = [(s.options["hidden"], s.sequence, s.options["vocabulary"]) for s in steps if s.workload == "gpt"]
        return {(column, size) for row in gpts for column, size in enumerate(row)}

    assert not sizes(GPU_CALIBRATION_STEPS) & sizes(GPU_TEST_STEPS)
    assert not sizes(GPU_CALIBRATION_STEPS) & sizes(GPU_MEMORY_STEPS)
    device = catalog.device("rtx-3090")
    assert runtime_of(device) == "torch-eager"
    for step in (*GPU_CALIBRATION_STEPS, *GPU_TEST_STEPS):
        assert compare.predict(step, device)[1] < 14.5 * 2**30, step.name


def test_measurements_keep_the_device_they_were_taken_on():
    measured = replace(synthetic(GPU_TEST_STEPS[0]), settings=Settings(device="cuda"), reserved_memory_bytes=7)
    assert Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    assert precision("bf16-amp").arithmetic is DType.BF16
    assert (data_sheet_times_s(catalog.device(SHEET), _kernels()) > 0).all()


def _kernels():
    from validation.operator_table import kernels_in_order

    step = GPU_TEST_STEPS[0]
    return next(k for k in kernels_in_order(workload_of(step), step.parsed(), "torch-eager") if len(k))
