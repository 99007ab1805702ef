"""Held-out fits over rows that the engine itself made under known constants."""

import json
from typing import Any

import pytest

from simtrain.core.errors import InputError
from simtrain.report.text import render
from tests.validation.test_report import FILE, made
from validation import fit_report
from validation.fit_published import Constant
from validation.fit_report import FIT_SOURCES, fit_layouts
from validation.fit_report_tables import fit_tables
from validation.fit_sources import fit_problem
from validation.layouts import LayoutSet, _workload

LAUNCH_S = 2e-5
FORMS = {
    "as shipped": (),
    "host": (
        Constant("runtime.launch_s", 6e-6, 1.0, 1e-6, 1e-4, "assumed"),
        Constant("link.omni-path-100.efficiency", 0.4, 0.2, 0.2, 1.0, "of no machine here"),
    ),
}


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> LayoutSet:
    monkeypatch.setattr("validation.layouts.load_layouts", lambda _: made())
    _workload.cache_clear()
    alone = [cells for cells in FILE["rows"] if cells[2] == 1 and cells[7] == "ok"]
    times = fit_problem([made(rows=alone)]).predict({"runtime.launch_s": LAUNCH_S}, range(len(alone)))
    rows: list[list[Any]] = [[*cells[:5], float(t), "", "ok"] for cells, t in zip(alone, times, strict=True)]
    dataset = made(rows=rows)
    _workload.cache_clear()
    monkeypatch.setattr("validation.layouts.load_layouts", lambda _: dataset)
    monkeypatch.setattr("validation.fit_tables.load_layouts", lambda _: dataset)
    monkeypatch.setattr("validation.fit_report.load_layouts", lambda _: dataset)
    monkeypatch.setattr(fit_report, "FIT_SOURCES", ("made",))
    monkeypatch.setattr(fit_report, "FORMS", FORMS)
    return dataset


def test_groups_left_out_are_predicted_by_constants_of_the_others(source: LayoutSet) -> None:
    lines: list[str] = []
    report = fit_layouts(["made"], progress=lines.append)
    shipped, host = report.forms
    assert shipped.fit is None
    assert host.fit is not None
    assert [c.name for c in host.constants] == ["runtime.launch_s"]  # no row has the other's link
    (before,), (after,) = shipped.sources, host.sources
    assert (after.by, after.groups, after.errors.count) == (("model",), 3, 3)
    assert after.errors.mean < 0.5 * before.errors.mean
    assert before.errors == before.in_sample
    low, high = host.spread["runtime.launch_s"]
    assert low <= host.fit.values["runtime.launch_s"] <= high
    assert before.null is not None
    assert before.null_in_sample.mean <= before.null.mean
    assert after.variants_looked_at == source.variants_looked_at + 1
    assert any("host" in line for line in lines)


def test_the_report_can_be_saved_and_shown(source: LayoutSet) -> None:
    report = fit_layouts(["made"])
    data = json.loads(json.dumps(report.to_dict()))
    assert data["command"] == "simtrain validate published --fit"
    assert data["provenance"]["simtrain"]
    assert [form["name"] for form in data["forms"]] == list(FORMS)
    assert data["forms"][1]["priors"][0]["why"] == "assumed"
    text = "".join(render(table, 200) for table in fit_tables(report))
    assert "nothing fitted" in text
    assert "runtime.launch_s" in text


def test_sources_that_are_no_evidence_are_refused() -> None:
    assert "vtrain_single_node" not in FIT_SOURCES
    with pytest.raises(InputError, match="not fitted to 'vtrain_single_node'"):
        fit_layouts(["vtrain_single_node"])
