"""The reference workload: a machine whose speed drifts is compared as a steady one."""

import json
from dataclasses import replace
from statistics import fmean

import pytest

pytest.importorskip("torch")

from validation import compare, machine_profile, probe
from validation.calibrate import calibration_settings, profile_from
from validation.features import class_features
from validation.fit import ClassCost
from validation.gpu_steps import GPU_CALIBRATION_STEPS, GPU_TEST_STEPS
from validation.machine_profile import MachineProfile
from validation.measure import measure
from validation.measurement import Environment, Measurement, Settings
from validation.reference import REFERENCE, reference_time_s
from validation.steps import CALIBRATION_STEPS, DEVELOPMENT_STEPS, MATCHED_STEPS, REFERENCE_STEPS, TEST_STEPS, gpt

HERE = Environment("Test CPU", 2, "2.13.0", "3.11", "Linux", "2026-01-01T00:00:00+00:00", 0.0, {})
COST = ClassCost(5e-6, 60e9, 9e9)
REFERENCE_S = 0.16
LISTED = (*CALIBRATION_STEPS, *DEVELOPMENT_STEPS, *TEST_STEPS, *MATCHED_STEPS, *GPU_CALIBRATION_STEPS, *GPU_TEST_STEPS)
TRIED = tuple(s for s in DEVELOPMENT_STEPS if s.parsed().checkpoint == "none" and s.parsed().accumulation == 1)


def synthetic(step, paces=(1.0,)):
    """A step on a machine of known constants whose processes run at paces (1.2 takes a fifth longer), its reference with them."""
    times = {name: COST.seconds(*row) for name, row in class_features(step).items()}
    seconds = [pace * sum(times.values()) for pace in paces]
    calls = {name: [paces[0] * time_s] for name, time_s in times.items()}
    return Measurement(
        step=step,
        step_time_s=sorted(seconds)[len(seconds) // 2],
        noise=0.01,
        process_spread=max(seconds) / min(seconds) - 1,
        peak_memory_bytes=10**8,
        class_times_s={name: paces[0] * time_s for name, time_s in times.items()},
        class_calls={},
        page_faults_per_step=0.0,
        environment=HERE,
        call_times_s=calls,
        process_times_s=tuple(seconds),
        reference_times_s=tuple(pace * REFERENCE_S for pace in paces),
    )


def calibrated(slow_from):
    """A profile of a machine that is a fifth slower from some calibration step on."""
    return profile_from([synthetic(step, (1.2 if i >= slow_from else 1.0,)) for i, step in enumerate(CALIBRATION_STEPS)])


def compared(profile, slow_from):
    predictions = [compare.predict(step, profile.device()) for step in TRIED]
    paces = [(1.0, 1.0, 1.2) if i < slow_from else (1.2,) * 3 for i in range(len(TRIED))]
    return compare.report(profile, [synthetic(step, pace) for step, pace in zip(TRIED, paces, strict=True)], predictions)


@pytest.fixture(scope="module")
def steady():
    return calibrated(len(CALIBRATION_STEPS))


def test_a_machine_that_slows_during_its_calibration_is_found_as_a_steady_one(steady):
    slowing = calibrated(2 * len(CALIBRATION_STEPS) // 3)
    assert slowing.reference_time_s == steady.reference_time_s == REFERENCE_S
    assert slowing.step_error == pytest.approx(steady.step_error, abs=1e-9)
    assert slowing.constants == pytest.approx(steady.constants, rel=1e-6)
    assert slowing.null_flops_per_s == pytest.approx(steady.null_flops_per_s)


def test_slowing_half_way_scales_the_whole_profile(steady):
    """The median reference then lies between both speeds: predictions are a tenth longer throughout, and errors are the same."""
    slowing = calibrated(len(CALIBRATION_STEPS) // 2)
    assert slowing.reference_time_s == pytest.approx(1.1 * REFERENCE_S)
    errors = [[row.time_error for row in compared(profile, len(TRIED) // 2).rows] for profile in (steady, slowing)]
    assert errors[1] == pytest.approx(errors[0], abs=2e-3)


def test_a_machine_that_slows_during_the_comparison_has_the_errors_of_a_steady_one(steady):
    alike, slowing = compared(steady, len(TRIED)), compared(steady, len(TRIED) // 2)
    assert [r.time_error for r in slowing.rows] == pytest.approx([r.time_error for r in alike.rows])
    assert [r.null_error for r in slowing.rows] == pytest.approx([r.null_error for r in alike.rows])
    assert slowing.rows[-1].speed == pytest.approx(1 / 1.2)
    assert slowing.raw_time.mean > slowing.time.mean + 0.05
    assert slowing.raw_time.mean == pytest.approx(fmean(abs(r.raw_time_error) for r in slowing.rows))
    summary, row = (json.loads(json.dumps(slowing.to_dict()))[key] for key in ("summary", "rows"))
    assert summary["raw_time"]["mean"] > summary["time"]["mean"]
    assert row[-1]["normalized_time_s"] * 1.2 == pytest.approx(row[-1]["measurement"]["step_time_s"])
    assert row[-1]["measurement"]["reference_times_s"] == pytest.approx([1.2 * REFERENCE_S] * 3)


def test_what_is_printed_says_what_it_is(steady):
    text = str(compared(steady, len(TRIED) // 2))
    assert "nothing of it is fitted to these steps" in text
    assert "raw times  mean" in text
    assert "83% to 100% of the speed" in text


def test_spread_between_processes_is_that_at_one_speed():
    step = TRIED[0]
    drifting = synthetic(step, (1.0, 1.1, 1.2))
    assert drifting.process_spread == pytest.approx(0.2)
    assert drifting.at_reference(REFERENCE_S).process_spread == pytest.approx(0)
    assert drifting.at_reference(0.0) is drifting
    once = drifting.at_reference(0.2)
    assert once.step_time_s == pytest.approx(0.2 / REFERENCE_S * synthetic(step).step_time_s)
    assert once.at_reference(0.2) == once


def test_a_profile_without_a_reference_compares_raw_times_and_says_so(steady):
    data = json.loads(steady.to_json())
    del data["reference"], data["reference_time_s"]
    for old in (MachineProfile.from_json(json.dumps(data)), replace(steady, reference="reference-of-last-year")):
        report = compared(old, len(TRIED) // 2)
        assert [r.time_error for r in report.rows] == [r.raw_time_error for r in report.rows]
        assert {r.speed for r in report.rows} == {None}
        assert "the profile has none, or another" in str(report)


def test_calibrations_in_part_without_a_reference_stay_raw():
    measured = [synthetic(step) for step in CALIBRATION_STEPS[:2]]
    assert reference_time_s(measured) == REFERENCE_S
    assert reference_time_s([measured[0], replace(measured[1], reference_times_s=())]) == 0
    assert reference_time_s([]) == 0


@pytest.mark.parametrize("known", [True, False])
def test_the_reference_is_timed_only_where_the_profile_has_one(steady, monkeypatch, known):
    asked = []

    def measured(steps, settings, progress):
        asked.append(settings.reference_repetitions)
        return tuple(synthetic(s) for s in steps)

    monkeypatch.setattr(compare, "measure", measured)
    report = compare.compare(steady if known else replace(steady, reference="", reference_time_s=0.0), TRIED[:1])
    assert [repetitions > 0 for repetitions in asked] == [known] * 3
    assert len(report.drifts) == len(report.raw_drifts) == 2


def test_drift_is_told_at_the_speed_of_the_calibration_and_by_the_clock(steady, monkeypatch):
    monkeypatch.setattr(compare, "measure", lambda steps, settings, progress: tuple(synthetic(s, (1.2,)) for s in steps))
    report = compare.compare(steady, TRIED[:1])
    assert [raw - at_speed for raw, at_speed in zip(report.raw_drifts, report.drifts, strict=True)] == pytest.approx([0.2] * 2, abs=0.01)
    assert "(by the clock +" in str(report)
    assert "run `simtrain calibrate`" not in str(report)


def test_probed_steps_are_put_at_the_speed_of_the_calibration(steady, monkeypatch):
    monkeypatch.setattr(probe, "measure", lambda steps, settings, progress: tuple(synthetic(s, (1.2,)) for s in steps))
    measured, speed = probe._measured(steady, TRIED[0], probe.PROBE_SETTINGS, None)
    assert (measured.step_time_s, speed) == (pytest.approx(synthetic(TRIED[0]).step_time_s), pytest.approx(1 / 1.2))


def test_quick_calibrations_and_gpus_do_without():
    assert calibration_settings("cpu").reference_repetitions > 0
    assert {calibration_settings("cpu", quick=True).reference_repetitions, calibration_settings("cuda").reference_repetitions} == {0}


def test_the_reference_is_no_other_step():
    seen = [(s.workload, json.dumps(s.options, sort_keys=True)) for s in LISTED]
    for step in REFERENCE_STEPS:
        assert step.name in REFERENCE
        assert (step.workload, json.dumps(dict(step.options), sort_keys=True)) not in seen
    language, _ = REFERENCE_STEPS
    for field in ("hidden", "vocabulary"):
        assert language.options[field] not in {s.options.get(field) for s in LISTED}
    assert language.sequence not in {s.sequence for s in LISTED}


def test_it_is_really_timed_beside_a_step():
    step = gpt("tiny", (1, 32, 2, 200), (2, 16), "sgd")
    settings = Settings(warmup_steps=1, timed_steps=2, memory=False, reference_repetitions=1)
    measured = measure((step,), settings)[0]
    assert measured.process_times_s == (measured.step_time_s,)
    assert measured.reference_times_s[0] > measured.step_time_s
    assert Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_files_of_older_measurements_are_read():
    data = synthetic(TRIED[0]).to_dict()
    del data["process_times_s"], data["reference_times_s"], data["settings"]["reference_repetitions"]
    read = Measurement.from_dict(data)
    assert (read.reference_times_s, read.settings.reference_repetitions) == ((), 0)
    assert machine_profile.MachineProfile.__dataclass_fields__["reference"].default == ""
