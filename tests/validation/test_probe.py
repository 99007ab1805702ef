"""Probing a model of one's own: its operators enter the table, and what they take is predicted afterwards."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

import simtrain as st
from hardware_models.cpu import CLASSES, CpuModel
from simtrain.cli.main import main
from simtrain.core import catalog
from simtrain.core.errors import InputError, UnknownNameError, UnsupportedError
from validation import machine_profile
from validation.features import CPU_RUNTIME
from validation.fit import ClassCost
from validation.machine_profile import MachineProfile
from validation.measure import environment
from validation.measurement import Environment, Measurement
from validation.operator_table import entries, kernels_in_order, operators_of
from validation.probe import PROBE_SETTINGS, ProbedSize, _at_another_batch, fold, probe, probed_step
from validation.steps import TrainingStep

HERE = Environment("Test CPU", 2, "2.13.0", "3.11", "Linux", "2026-01-01T00:00:00+00:00", 0.0, {})
RATES = {"launch_s": 5e-6, "flops_per_s": 6e10, "bytes_per_s": 1e10}
PROFILE = MachineProfile(
    {f"{name}.{term}": value for name in CLASSES for term, value in RATES.items()}, HERE, ("a",), {}, {}, 0.0, 0.0, {"fp32": 5e10}
)
MINE = """
import torch
from torch import nn
import torch.nn.functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12 * 64, 7)

    def forward(self, x):
        return self.fc(F.gelu(self.conv(x)).flatten(1))


def make():
    loss = lambda output, batch: F.cross_entropy(output, batch[1])
    return {"model": Net, "batch": (torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), "loss": loss}
"""


def gpt_step(batch=4):
    return TrainingStep("probed", "gpt2-small", 96, f"micro_batch={batch},optimizer=sgd")


def slower(step, work, factor):
    """A measured step whose operators take a factor longer than the profile says."""
    costs = dict.fromkeys(CLASSES, RATES)
    times = {
        name: [factor * (row[0] * c["launch_s"] + row[1] / c["flops_per_s"] + row[2] / c["bytes_per_s"]) for row in asked.work]
        for name, asked in operators_of(work, step.parsed(), CPU_RUNTIME).items()
        for c in (costs[name],)
    }
    sums = {name: sum(t) for name, t in times.items()}
    return Measurement(step, sum(sums.values()), 0.0, 0.0, 0, sums, {}, 0.0, environment=HERE, call_times_s=times)


@pytest.fixture(scope="module")
def work():
    return catalog.workload("gpt2-small", seq_len=96)


def test_a_model_twice_as_slow_is_found_to_be_so(work):
    step = gpt_step()
    folded, covered = fold(PROFILE, work, slower(step, work, 2.0))
    assert covered == pytest.approx(1.0, abs=0.01)
    for kernels in _kernels(work, step):
        before, after = (CpuModel().kernel_times_s(p.device(), kernels) for p in (PROFILE, folded))
        assert after / before == pytest.approx(2.0, rel=0.02)
    assert folded.steps[-1] == "gpt2-small (micro_batch=4,optimizer=sgd)"


def test_half_the_batch_learns_from_it(work):
    folded, _ = fold(PROFILE, work, slower(gpt_step(4), work, 2.0))
    for kernels in _kernels(work, gpt_step(3)):
        before, after = (CpuModel().kernel_times_s(p.device(), kernels) for p in (PROFILE, folded))
        assert (after / before > 1.3).all()


def _kernels(work, step):
    return [k for k in kernels_in_order(work, step.parsed(), CPU_RUNTIME) if len(k)]


def test_classes_that_cannot_be_told_apart_are_left_out(work):
    step = gpt_step()
    measured = slower(step, work, 2.0)
    times = dict(measured.call_times_s) | {"gemm": measured.call_times_s["gemm"][:-1]}
    operators = operators_of(work, step.parsed(), CPU_RUNTIME)
    costs = {name: cost for name, cost in _costs().items() if name != "norm"}
    assert set(operators) - set(entries(operators, times, costs, 0.0)) == {"gemm", "norm"}


def _costs():
    return dict.fromkeys(CLASSES, ClassCost(**RATES))


def test_nothing_to_fold_in_is_said(work):
    with pytest.raises(InputError, match="could be paired"):
        fold(PROFILE, work, replace(slower(gpt_step(), work, 1.0), call_times_s={}, class_times_s={}))


@pytest.mark.parametrize("extra", ["checkpoint=full", "accumulation=2", "data=2"])
def test_only_plain_steps_are_probed(work, extra):
    with pytest.raises(UnsupportedError, match="plain steps"):
        probed_step("gpt2-small", f"micro_batch=4,optimizer=sgd,{extra}", work)


def test_the_held_out_batch_is_another_one():
    for batch, other in ((1, 2), (3, 6), (4, 2), (9, 4)):
        assert _at_another_batch(gpt_step(batch)).micro_batch == other


def test_a_line_tells_errors_before_and_after():
    line = str(ProbedSize(8, 0.1, 0.02, 0.13, 0.101, fitted=False))
    assert "+30.0%" in line
    assert "+1.0%" in line
    assert "held out" in line


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A model of one's own, probed for real: its catalog name, the report and the file of the profile."""
    folder = tmp_path_factory.mktemp("probed")
    (folder / "mine.py").write_text(MINE)
    name = f"capture:{folder / 'mine.py'}:make"
    report = probe(PROFILE, name, "micro_batch=8,optimizer=adamw")
    machine_profile.save(report.profile, folder / "profile.json")
    return name, report, folder / "profile.json"


def test_a_probe_of_a_file_is_run_folded_in_and_kept(probed):
    _, report, path = probed
    fitted, held_out = report.sizes
    assert (fitted.batch, held_out.batch) == (8, 4)
    assert fitted.measured_s > 0
    assert abs(fitted.after_s / fitted.measured_s - 1) < abs(fitted.before_s / fitted.measured_s - 1) + 0.05
    assert 0 < report.covered < 1
    assert "convolution" in report.profile.operator_table
    assert machine_profile.load(path, HERE) == report.profile
    assert json.loads(path.read_text())["steps"][-1].startswith("capture:")


def test_predictions_and_plans_can_name_the_probed_profile(probed):
    name, report, path = probed
    fitted, held_out = report.sizes
    for size in (fitted, held_out):
        result = st.schedule(st.workload(name), f"profile:{path}", f"micro_batch={size.batch},optimizer=adamw")
        assert result.step_time_s == pytest.approx(size.after_s, rel=1e-12)
    found = st.plan(st.workload(name), f"1x profile:{path}", global_batch=16)
    assert all(result.cluster == f"1x profile:{path}" for result in found.ranked)
    assert min(r.step_time_s for r in found.ranked) < 16 / held_out.batch * held_out.after_s


def test_the_command_line_names_a_profile_by_its_place(probed, tmp_path, monkeypatch, capsys):
    name, report, _ = probed
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["predict", name, "--cluster", "profile:probed", "--strategy", "micro_batch=8,optimizer=adamw", "--json"]
    assert main(command) == 2
    assert "run `simtrain calibrate --probe WORKLOAD`" in "".join(capsys.readouterr())
    machine_profile.save(report.profile, machine_profile.probed_path())
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["step_time_s"] == pytest.approx(report.sizes[0].after_s, rel=1e-9)


def test_a_prediction_with_the_profile_of_another_machine_says_so(probed):
    name, report, path = probed
    said = st.schedule(st.workload(name), f"profile:{path}", "micro_batch=8").assumptions
    assert any("measured elsewhere, with processor 'Test CPU'" in line for line in said)
    mine = path.with_name("mine.json")
    machine_profile.save(replace(report.profile, environment=environment()), mine)
    result = st.schedule(st.workload(name), f"profile:{mine}", "micro_batch=8")
    assert not any("elsewhere" in line for line in result.assumptions)
    assert result.memory.capacity_bytes == environment().memory_bytes


def test_names_of_profiles_are_checked(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'probed'"):
        st.device("profile:probd")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="is not a machine profile"):
        st.device(f"profile:{tmp_path / 'other.json'}")


def test_twenty_steps():
    assert PROBE_SETTINGS.warmup_steps + PROBE_SETTINGS.timed_steps + PROBE_SETTINGS.operator_steps == 20


def test_classes_that_cannot_be_told_apart_share_their_total(work):
    step = gpt_step()
    measured = slower(step, work, 3.0)
    times = dict(measured.call_times_s) | {"gemm": []}
    operators = {"gemm": operators_of(work, step.parsed(), CPU_RUNTIME)["gemm"]}
    rows = entries(operators, times, _costs(), 0.0, measured.class_times_s)["gemm"]
    assert [np.exp(row[-1]) for row in rows] == pytest.approx([3.0] * len(rows), rel=1e-3)
