"""Ways to recompute, really run: the predicted peak is the measured one, and gradients are equal."""

import pytest

from validation.measure import environment
from validation.memory import MemoryReport, MemoryRow
from validation.memory_worker import Trainer
from validation.steps import gpt, image_model

STEPS = {
    "gpt": gpt("tiny", (6, 64, 2, 64), (4, 64), "sgd"),
    "resnet": image_model("tiny-resnet", "resnet18-cifar", 2, "sgd", recomputable=True),
}


@pytest.mark.parametrize("name", STEPS)
def test_ways_save_memory_and_keep_gradients(name):
    plain = Trainer(STEPS[name], "none")
    gradients, most = plain.gradients(), plain.peak_bytes()
    for way in ("full", "layers:[0-2]"):
        trainer = Trainer(STEPS[name], way)
        own = trainer.gradients()
        assert all((own[n] == gradients[n]).all() for n in gradients)
        assert trainer.peak_bytes() < most


def test_a_report_says_errors_and_what_did_not_run():
    rows = (
        MemoryRow("a", "none", "none", 100.0, 101.0, 1.0, 1.1),
        MemoryRow("a", "full", "full", 50.0, 50.0, 1.3, 1.43),
        MemoryRow("a", "partitioner:0.5", "", error="no compiler"),
    )
    report = MemoryReport(rows, environment())
    assert report.to_dict()["summary"]["slowdown"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert "did not run: no compiler" in str(report)
    assert "+1.00%" in str(report)
