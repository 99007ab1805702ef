"""Published times of kernels: rows are what they say, and the device models beat knowing nothing but the data sheet."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from hardware_models.gpu_constants import GpuConstants
from simtrain.core.catalog import device
from validation import kernels_published as kernels
from validation.errors import skill
from validation.published import load


@pytest.fixture(scope="module")
def reports():
    return {r.title: r for r in kernels.compare_kernels()}


def _one(reports, start):
    (found,) = (r for title, r in reports.items() if title.startswith(start))
    return found


def test_best_shapes_stay_below_the_peak_and_near_the_prediction(reports):
    report = _one(reports, "Best matrix products")
    assert all(row.measured_s > row.ideal_s for row in report.rows)
    assert report.errors.mean < 0.11
    assert skill(report.errors, report.nulls["flat roofline"]) > 0.6


def test_squares_follow_the_power_of_the_board(reports):
    report = _one(reports, "Square matrix products")
    # An H100 is priced for products that last; these calls are short.
    assert report.errors.median < 0.09
    assert skill(report.errors, report.nulls["flat roofline"]) > 0.6


def test_sweeps_are_predicted_better_than_by_a_roofline(reports):
    report = _one(reports, "DeepBench matrix")
    assert len(report.rows) == 480
    assert report.errors.median < 0.08
    assert skill(report.errors, report.nulls["flat roofline"]) > 0.7


def test_language_models_on_gpus_left_out_beat_the_nulls(reports):
    report = _one(reports, "Forward and backward")
    assert report.errors.mean < 0.09
    assert skill(report.errors, report.nulls["flat roofline"]) > 0.85
    assert skill(report.errors, report.nulls["one share of the peak per path, from the other devices"]) > 0.8


def test_a_tpu_never_takes_longer_than_the_step_it_is_part_of(reports):
    report = _one(reports, "Transformers on TPU")
    assert {row.device for row in report.rows} == {"tpu-v5e", "tpu-v4"}
    assert all(row.predicted_s < row.measured_s < 1.3 * row.predicted_s for row in report.rows)


def test_the_tpu_models_are_those_of_their_configurations():
    rows = kernels.load_table("tpu_transformers")["row"]
    assert len(rows) == 28
    billions = {(r["layers"], r["hidden"]): kernels.tpu_workload(r).parameter_count / 1e9 for r in rows}
    expected = {(32, 4096): (16, 8.03), (64, 8192): (64, 128), (32, 8192): (32, 32), (48, 6144): (22, 22)}
    for key, (low, high) in expected.items():
        assert any(billions[key] == pytest.approx(size, rel=0.05) for size in (low, high)), billions


def test_whole_steps_on_one_gpu_are_transcribed_with_their_devices():
    for name in (*kernels.FITTED_SETS, *kernels.HELD_OUT_SETS):
        dataset = load(name)
        assert all(device(row.device).peak_flops for row in dataset.rows)
        assert dataset.variants_looked_at >= 1


def test_reports_are_plain_data_and_text(reports):
    for report in reports.values():
        data = report.to_dict()
        assert data["summary"]["count"] == len(report.rows)
        assert "predictions" in str(report)


def test_devices_left_out_are_predicted_better_than_by_a_flat_roofline(reports):
    report = _one(reports, "Forward and backward passes")
    assert report.left_out["predictions"].mean < report.left_out["flat roofline"].mean
    doubled = replace(report, rows=tuple(replace(r, predicted_s=2 * r.predicted_s) for r in report.rows))
    assert doubled.left_out["predictions"].mean == pytest.approx(report.left_out["predictions"].mean)  # a common factor is learned
    assert _one(reports, "ResNets").left_out == {}  # one device


def test_convolutions_are_predicted_better_than_by_knowing_nothing(reports):
    report = _one(reports, "DeepBench convolutions")
    assert len(report.rows) == 4 * 76
    assert all(skill(report.errors, null) > 0.25 for null in report.nulls.values())
    assert report.errors.median < 0.3


def test_gradients_of_fp32_convolutions_take_the_median_multiples_of_the_published_table() -> None:
    constants = GpuConstants()
    table = kernels.load_table("convolutions")
    rows = [dict(zip(table["header"], row, strict=True)) for row in table["rows"]]

    def median(part: str, chosen: Callable[[dict[str, float]], bool]) -> float:
        return float(np.median([r[f"fp32 {part}"] / r["fp32 forward"] for r in rows if chosen(r)]))

    assert constants.convolution_to_filter == pytest.approx(median("to filter", lambda r: r["edge"] > 1), abs=0.005)
    assert constants.convolution_to_filter_point == pytest.approx(median("to filter", lambda r: r["edge"] == 1), abs=0.005)
    assert constants.convolution_to_input == pytest.approx(median("to input", lambda r: r["stride"] == 1), abs=0.005)
    assert constants.convolution_to_input_strided == pytest.approx(median("to input", lambda r: r["stride"] > 1), abs=0.005)
