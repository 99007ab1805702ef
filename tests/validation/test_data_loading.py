import json

import pytest

from simtrain.core.errors import InputError
from validation import data_loading
from validation.data_loading import TEST_CASES, Case, Line, LoaderCosts, LoadingReport, compare_loading, predict_row
from validation.measure import environment

COSTS = LoaderCosts(send=Line(1e-3, 0.0), receive=Line(5e-4, 0.0), collate=Line(2e-4, 0.0))
MEASURED = {
    "batch_bytes": 1e6,
    "sample_s": 1e-3,
    "worker_sample_s": 1.2e-3,
    "step_s": 4e-3,
    "runs": {str(w): {"wall_s": 9e-3, "main_cpu_s": 4.5e-3, "workers_cpu_s": 9e-3, "foreign": 0.2 * (w == 2)} for w in (0, 1, 2, 4)},
}


def row(workers):
    return predict_row(MEASURED, Case("c", 64, 8, 10), workers, COSTS, cores=2)


def test_cases_are_several_and_none_was_developed_on():
    assert len(TEST_CASES) >= 8
    assert not {96, 128} & {case.side for case in TEST_CASES}
    assert len({case.name for case in TEST_CASES}) == len(TEST_CASES)


def test_a_line_is_found_again_and_never_below_zero():
    sizes = [1e5, 1e6, 1e7]
    line = Line.through(sizes, [2e-4 + 3e-10 * size for size in sizes])
    assert (line.fixed_s, line.byte_s) == pytest.approx((2e-4, 3e-10))
    assert Line.through(sizes, [1e-3, 5e-4, 4e-4]).byte_s == 0


def test_a_prediction_takes_each_part_where_it_is_spent():
    own, one, two = row(0), row(1), row(2)
    assert (own.predicted_s, own.predicted_main_s) == (pytest.approx(12.2e-3), pytest.approx(12.2e-3))
    assert own.predicted_workers_s == 0
    # a worker's samples cost what they cost a process that waits
    assert (one.predicted_s, one.predicted_workers_s) == (pytest.approx(10.6e-3), pytest.approx(10.6e-3))
    assert one.predicted_main_s == pytest.approx(4.5e-3)
    assert two.closed_s == pytest.approx((10.6e-3 + 4.5e-3) / 2)
    assert (own.null_s, two.null_s) == (pytest.approx(12e-3), pytest.approx(4.8e-3))


def test_wall_times_that_others_disturbed_do_not_count():
    report = LoadingReport((row(0), row(1), row(2)), COSTS, environment())
    errors = report.errors()
    assert (errors["wall time"].count, errors["CPU time"].count, errors["CPU time, workers"].count) == (2, 3, 2)
    assert "wall times of 1 loaders do not count" in str(report)
    assert json.dumps(report.to_dict())


def test_a_real_loader_comes_back_with_all_its_times(monkeypatch):
    monkeypatch.setattr(data_loading, "MEASURED_S", 0.02)
    monkeypatch.setattr(data_loading, "CALIBRATION_BYTES", (65_536, 1_048_576))
    monkeypatch.setattr(data_loading, "WORKERS", (0, 1))
    report = compare_loading((Case("tiny", 64, 4, 5),))
    assert [r.workers for r in report.rows] == [0, 1]
    assert report.rows[1].workers_s > 0
    assert all(r.wall_s > 0 and r.main_s > 0 and r.predicted_s > 0 for r in report.rows)


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(InputError, match="only Linux"):
        compare_loading(())
