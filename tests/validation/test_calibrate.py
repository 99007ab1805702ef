import json
from dataclasses import replace

import pytest

from hardware_models.cpu import CLASSES
from simtrain.core.errors import InputError
from validation import compare, machine_profile
from validation.calibrate import profile_from
from validation.features import class_features, executed_flops
from validation.fit import ClassCost
from validation.measurement import Environment, Measurement
from validation.steps import CALIBRATION_STEPS, DEVELOPMENT_STEPS, gpt

HERE = Environment("Test CPU", 2, "2.13.0", "3.11", "Linux", "2026-01-01T00:00:00+00:00", 0.0, {})
KNOWN = {name: ClassCost(4e-6 + 1e-6 * i, (50 + 5 * i) * 1e9, (8 + i) * 1e9) for i, name in enumerate(CLASSES)}
OUTSIDE_S = 1e-6


def synthetic(step):
    features = class_features(step)
    times = {name: KNOWN[name].seconds(*row) for name, row in features.items()}
    total = sum(times.values()) + OUTSIDE_S * sum(row[0] for name, row in features.items() if name != "optimizer")
    return Measurement(step, total, 0.01, 0.0, 0, times, {}, 0.0, environment=HERE)


@pytest.fixture(scope="module")
def profile():
    return profile_from([synthetic(step) for step in CALIBRATION_STEPS])


def test_a_machine_of_known_constants_is_recovered(profile):
    assert profile.constants["gemm.flops_per_s"] == pytest.approx(KNOWN["gemm"].flops_per_s, rel=0.03)
    assert profile.framework_launch_s == pytest.approx(OUTSIDE_S, rel=0.2)
    assert profile.step_error < 0.01


def test_steps_of_that_machine_are_predicted(profile):
    device = profile.device()
    for step in DEVELOPMENT_STEPS:
        if step.parsed().checkpoint == "none" and step.parsed().accumulation == 1:
            time_s, _ = compare.predict(step, device)
            assert time_s == pytest.approx(synthetic(step).step_time_s, rel=0.02)


def test_the_calibrated_device_says_where_its_constants_come_from(profile):
    device = profile.device()
    assert device.name == "cpu-core (calibrated)"
    assert "Test CPU" in device.provenance["profile"].source


def test_a_profile_round_trips_through_its_file(profile, tmp_path):
    path = tmp_path / "deep" / "profile.json"
    machine_profile.save(profile, path)
    assert machine_profile.load(path, HERE) == profile


@pytest.mark.parametrize(("field", "value"), [("cpu_model", "Other CPU"), ("torch_version", "9.9")])
def test_a_profile_of_another_machine_is_refused(profile, tmp_path, field, value):
    path = tmp_path / "profile.json"
    machine_profile.save(profile, path)
    with pytest.raises(InputError, match="simtrain calibrate"):
        machine_profile.load(path, replace(HERE, **{field: value}))


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format": 0}), json.dumps({"format": 1})])
def test_a_broken_profile_is_refused(text, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(InputError, match="simtrain calibrate"):
        machine_profile.load(path, HERE)


def test_a_missing_profile_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="simtrain calibrate"):
        machine_profile.load(tmp_path / "none.json", HERE)


def test_recomputation_counts_in_the_null_model():
    plain = gpt("a", (4, 64, 2, 100), (2, 16), "sgd")
    again = gpt("b", (4, 64, 2, 100), (2, 16), "sgd", "checkpoint=full")
    assert 1.2 < executed_flops(again) / executed_flops(plain) < 1.34


def test_a_report_has_errors_of_prediction_and_null_model(profile):
    measurements = [replace(synthetic(s), peak_memory_bytes=10**8) for s in CALIBRATION_STEPS]
    report = compare.report(profile, measurements, [(m.step_time_s * 1.02, 1.01e8) for m in measurements])
    assert report.time.mean == pytest.approx(0.02)
    assert report.memory.bias == pytest.approx(0.01)
    assert "null model" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["summary"]["variants_looked_at"] == report.variants_looked_at


def test_a_machine_that_became_slower_is_told(profile, monkeypatch):
    """Its own steps take a tenth longer than the profile says, then a hundredth."""
    paces = iter((1.1, 1.0, 1.01))

    def measured(steps, settings, progress):
        pace = next(paces)
        times = [pace * compare.predict(step, profile.device())[0] for step in steps]
        return tuple(replace(synthetic(s), step_time_s=t, peak_memory_bytes=10**8) for s, t in zip(steps, times, strict=True))

    monkeypatch.setattr(compare, "measure", measured)
    report = compare.compare(profile, DEVELOPMENT_STEPS[:1])
    assert report.drifts == pytest.approx((0.1, 0.01))
    assert "+10.0% before and +1.0% after" in str(report)
    assert "run `simtrain calibrate`" in str(report)
    assert "machine has changed" not in str(replace(report, drifts=(0.01, -0.02)))
