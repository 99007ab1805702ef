import pytest

from simtrain.core import catalog
from validation.published import compare, load

SETS = ("resnet50_single_gpu", "resnet50_dgx", "timm_rtx3090")


@pytest.fixture(scope="module", params=SETS)
def report(request):
    return compare(load(request.param))


def test_rows_name_their_source(report):
    assert all(row.file and row.line > 0 for row in report.dataset.rows)
    assert report.dataset.variants_looked_at >= 1
    for row in report.dataset.rows:
        assert catalog.workload(row.model, **row.options).sample_unit == "image"


def test_predictions_are_sane_and_better_than_one_mfu(report):
    assert all(0.5 < r.predicted / r.row.samples_per_s < 2 for r in report.rows)
    name = next(name for name in ("one MFU", "one MFU per device") if name in report.nulls)
    assert report.errors.mean < report.nulls[name].mean


def test_a_null_model_is_left_out_where_every_row_has_a_constant_of_its_own():
    by_device, one_device = (compare(load(name)) for name in (SETS[0], SETS[-1]))
    assert set(by_device.nulls) == {"one MFU per arithmetic path", "one MFU"}
    assert set(one_device.nulls) == {"one MFU per device"}


def test_channels_last_is_faster_in_prediction_as_in_measurement():
    rows = {(r.row.model, bool(r.row.options)): r for r in compare(load("timm_rtx3090")).rows if r.row.model.startswith("resnet")}
    for model in ("resnet18", "resnet50", "resnet152"):
        last, first = rows[model, True], rows[model, False]
        assert last.row.samples_per_s > first.row.samples_per_s
        assert last.predicted > 1.1 * first.predicted


def test_the_report_says_where_every_row_comes_from(report):
    assert str(report).count("assumed: ") == len(report.dataset.assumptions)
    assert all("line" in row["source"] for row in report.to_dict()["rows"])
    assert "overlap" not in str(report)
