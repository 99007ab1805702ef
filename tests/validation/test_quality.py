import json

import numpy as np
import pytest

from simtrain.core.errors import InputError
from validation import quality
from validation.quality import BAND, COMPONENTS, QualityReport, compare_quality, judge


def test_verdicts_at_what_leaves_no_doubt():
    rng = np.random.default_rng(0)
    noise = 0.001 * rng.standard_normal(16)
    assert judge(noise)[2] == "equivalent"
    assert judge(noise + 0.02)[2] == "better"
    assert judge(noise - 0.02)[2] == "worse"
    wide = 20 * (noise - noise.mean())
    low, high, verdict, needed = judge(wide)
    assert verdict == "not told"
    assert low < -BAND < BAND < high
    assert needed > 16
    assert judge(20 * noise + 0.02)[3] is None
    assert judge([0.0] * 5)[2] == "equivalent"
    with pytest.raises(InputError, match="three or more"):
        judge([0.0, 0.0])


def test_the_interval_is_that_of_scipys_paired_t_test():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(1).standard_normal(12)
    interval = ttest_1samp(values, 0.0).confidence_interval(0.90)
    assert judge(values)[:2] == pytest.approx((interval.low, interval.high))


def test_equivalence_is_claimed_wrongly_no_more_often_than_its_level():
    rng = np.random.default_rng(2)
    wrong = sum(judge(rng.normal(BAND, 0.004, 10))[2] == "equivalent" for _ in range(2000))
    assert wrong / 2000 < 0.065


def test_differences_are_paired_and_better_is_above_zero(monkeypatch):
    def fake(request):
        offset = request["seed"] * 0.1  # far more between seeds than between components
        sign = 1 if request["task"] == "digits" else -1
        return [
            {**request, "component": c, "quality": 1 + sign * (offset + 0.1 * (c == "schedule")), "cpu_s": 1 + (c == "checkpoint")}
            for c in request["components"]
        ]

    monkeypatch.setattr(quality, "_train", fake)
    report = compare_quality({"digits": 4, "text": 4})
    verdicts = {(v.task, v.component): v for v in report.verdicts}
    assert verdicts["digits", "bf16-amp"].verdict == "equivalent"
    assert verdicts["digits", "schedule"].difference == pytest.approx(0.1)
    assert verdicts["text", "schedule"].difference > 0.1
    assert verdicts["digits", "checkpoint"].cpu_share == pytest.approx(1.0)
    assert len(report.verdicts) == 2 * len(COMPONENTS)
    assert isinstance(report, QualityReport)
    assert json.dumps(report.to_dict())
    assert "equivalent" in str(report)


@pytest.mark.parametrize("name", ["digits", "text"])
def test_recomputation_changes_nothing_and_every_component_trains(name, monkeypatch):
    pytest.importorskip("sklearn")
    import torch

    from validation import quality_worker

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on busy cores take most of the time

    class Short(quality_worker.TASKS[name]):
        def __init__(self, seed, *, recompute):
            super().__init__(seed, recompute=recompute)
            self.samples = 6 * self.micro_batch

        def quality(self):
            return float(self.loss(self.draw(16)).detach())

    monkeypatch.setitem(quality_worker.TASKS, name, Short)
    runs = {c: quality_worker.train(name, 7, c) for c in ("baseline", *COMPONENTS)}
    torch.set_num_threads(threads)
    assert runs["checkpoint"]["quality"] == runs["baseline"]["quality"]
    assert runs["bf16-amp"]["quality"] != runs["baseline"]["quality"]
    assert all(0 < r["quality"] < 6 for r in runs.values())
    assert runs["dynamic-batch-samples"]["steps"] <= runs["baseline"]["steps"] == 6
