import pytest

from simtrain.core import catalog
from simtrain.core.runtimes import runtime
from simtrain.step.predict import estimate
from validation.published import compare, load


@pytest.fixture(scope="module")
def report():
    return compare(load())


def test_every_row_names_its_source():
    dataset = load()
    assert len(dataset.rows) == 8
    assert dataset.repository.startswith("https://github.com/")
    assert dataset.assumptions
    assert all(row.file and row.line > 0 for row in dataset.rows)


def test_batches_are_per_device():
    rows = {(r.model, r.precision, r.devices): r.micro_batch for r in load().rows}
    assert all(rows[model, path, 1] == rows[model, path, 2] for model, path, _ in rows)


def test_predictions_are_sane(report):
    assert all(0.4 < r.predicted / r.row.samples_per_s < 2.5 for r in report.rows)


def test_two_devices_are_faster_than_one_but_not_twice(report):
    predicted = {(r.row.model, r.row.precision, r.row.devices): r.predicted for r in report.rows}
    for (model, path, devices), throughput in predicted.items():
        if devices == 2:
            assert predicted[model, path, 1] < throughput <= 2.001 * predicted[model, path, 1]


@pytest.mark.parametrize("name", ["bert_rtx3090", "bert_single_gpu"])
def test_the_largest_batches_that_were_run_fit_and_a_quarter_more_would_not(name):
    """Both sources state the largest batch per memory size: BERT on 24, 40, 48 and 80 GB, whole and half precision."""
    dataset = load(name)
    for row in (row for row in dataset.rows if row.devices == 1):
        framework = runtime(dataset.runtime).with_(fused_attention=dataset.fused_attention, optimizer_style=row.optimizer_style)
        workload = catalog.workload(row.model, seq_len=dataset.sequence)
        for batch, fits in ((row.micro_batch, True), (row.micro_batch * 5 // 4, False)):
            memory = estimate(workload, row.device, f"micro_batch={batch},precision={row.precision}", runtime=framework).memory
            assert (memory.device_bytes <= memory.capacity_bytes) is fits, (row.name, batch)


def test_null_models_know_nothing_but_flops(report):
    ratios = {r.row.devices: r.null_device for r in report.rows if r.row.model == "bert-base" and r.row.precision == "tf32"}
    assert ratios[2] == pytest.approx(2 * ratios[1])


def test_the_report_is_plain_data_and_text(report):
    data = report.to_dict()
    assert len(data["rows"]) == 8
    assert set(data["nulls"]) == set(report.nulls)
    assert "skill" in str(report)
