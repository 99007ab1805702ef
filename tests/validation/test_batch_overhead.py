import json

import pytest

from validation.batch_overhead import CASES, EVERY, Overhead, OverheadReport, measure_overhead
from validation.measure import environment
from validation.steps import gpt


def test_overhead_weighs_measured_steps_by_how_often_they_come():
    row = Overhead("a", plain_s=1.0, unmeasured_s=1.01, measured_s=1.21)
    assert row.share == pytest.approx(0.02)
    assert row.measuring_share == pytest.approx(0.2 / EVERY)
    report = OverheadReport((row,), environment())
    assert json.dumps(report.to_dict())
    assert "overhead median 2.00%" in str(report)


def test_cases_cover_both_kinds_of_norm_and_accumulate():
    strategies = [case.parsed() for case in CASES]
    assert {"adamw", "sgd"} <= {s.optimizer for s in strategies}
    assert all(s.accumulation >= 2 for s in strategies)


def test_a_real_step_is_measured_both_ways():
    (row,) = measure_overhead((gpt("tiny", (1, 32, 2, 64), (2, 16), "adamw", "accumulation=2"),), rounds=9).rows
    assert row.plain_s > 0
    assert row.unmeasured_s > 0
    assert row.measured_s > 0
