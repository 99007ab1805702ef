"""Energy under caps and slack of pipelines, beside published measurements."""

import pytest

from validation.energy import compare_energy


@pytest.fixture(scope="module")
def report():
    return compare_energy()


def test_laws_predict_caps_that_they_have_not_seen(report):
    errors = report.errors()["time at a left-out cap"]
    assert errors.median < 0.02
    assert errors.worst < 0.06


def test_the_chosen_cap_costs_little_more_than_the_best(report):
    assert report.errors()["energy regret of the chosen cap"].worst < 0.06
    assert all(0.04 < job.best_saved < 0.4 for job in report.jobs)


def test_least_energies_of_steps_are_those_that_perseus_found(report):
    assert report.errors()["energy of frontiers"].worst < 0.02
    for row in report.slack:
        if row.waiting_w == report.slack[0].waiting_w:
            assert row.predicted_saved == pytest.approx(row.saved, abs=0.015)


def test_the_report_shows_every_row_and_the_null_model(report):
    text = str(report)
    assert all(job.job in text for job in report.jobs)
    assert "skill of other jobs' constants over the null" in text
    assert report.to_dict()["errors"].keys() == report.errors().keys()
