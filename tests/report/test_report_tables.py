import dataclasses
import sys
import types

import pytest

from simtrain import report
from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.hardware import Provenance, ValueKind
from simtrain.planner.search import Failure, Plan

GIB = 2**30


def _row(text, name):
    return next(line.strip() for line in text.splitlines() if line.strip().startswith(name))


def test_a_result_shows_speed_both_conventions_of_mfu_and_what_bounds_it(result):
    text = report.render(report.result_table(result))
    assert "150 ms, bound by compute" in text
    assert "31.2% (attention in full" in text
    assert "29.8% (causal attention as computed)" in text
    assert "427 samples/s, 437,198 tokens/s" in text
    assert "4x rtx-3090 (4 devices used)" in text


def test_the_breakdown_is_shown_to_sum_to_the_period(result):
    text = report.render(report.result_table(result), width=60)
    assert _row(text, "sum = step").split() == ["sum", "=", "step", "150", "ms", "100.0%"]
    for part in result.breakdown_s:
        assert part in text


def test_memory_is_shown_by_kind_and_as_three_totals_beside_the_capacity(result):
    text = report.render(report.result_table(result), width=60)
    assert _row(text, "activation").endswith("50.0%")
    for name in ("allocated by tensors", "reserved by allocator", "on the device", "device capacity"):
        assert "GiB" in _row(text, name)
    assert "workspace" not in text, "kinds that take nothing are left out"


def test_it_is_said_whether_it_fits(result, too_large):
    assert "fits, 16.0 GiB left" in report.render(report.result_table(result))
    assert "DOES NOT FIT, over by 6.00 GiB" in report.render(report.result_table(too_large))


def test_assumptions_sources_and_unknown_prices_are_said(result):
    text = report.render(report.result_table(result))
    assert "- host power not counted" in text
    assert "- a formula, 2020" in text
    assert "no price known" in text
    assert "0.25 USD per step" in report.render(report.result_table(dataclasses.replace(result, cost_usd=0.25)))


def test_square_brackets_are_no_markup(result):
    odd = dataclasses.replace(result, assumptions=("[bold] is text",), strategy="plan=1x(any[0:6])", cluster="[red]")
    text = report.render(report.result_table(odd))
    assert "[bold] is text" in text
    assert "any[0:6]" in text
    assert "[red]" in text


@pytest.fixture
def plan(result):
    slower = dataclasses.replace(result, strategy="data=4,micro_batch=8,accumulation=2", step_time_s=0.2)
    failed = (
        Failure(
            "data=4,micro_batch=16",
            "out of memory by 2.00 GiB at loss",
            2 * GIB,
            "activation",
            "data=4,micro_batch=8,accumulation=2",
            300.0,
        ),
        Failure(
            "data=4,micro_batch=32",
            "out of memory by 9.00 GiB at backward",
            9 * GIB,
            "activation",
            "data=4,micro_batch=8,accumulation=4",
            300.0,
        ),
        Failure("data=4,precision=bf16", "no bf16 arithmetic"),
    )
    return Plan("gpt2-small", "4x rtx-3090", 64, "throughput", 5, (result, slower), failed)


def test_a_plan_ranks_and_groups_what_fails(plan):
    text = report.render(report.plan_table(plan), width=200)
    assert "5 strategies: 2 fit, 3 do not" in text
    assert _row(text, "1 ").startswith("1   data=4, micro_batch=4")
    group = _row(text, "2   out of memory, mostly activation")
    assert "2.00 GiB to 9.00 GiB" in group
    assert "micro_batch=8, accumulation=2 (300 samples/s)" in group, "only what changes is named"
    assert "no bf16 arithmetic" in text


def test_a_plan_shows_only_the_top(plan):
    text = report.render(report.plan_table(plan, top=1), width=200)
    assert "Best 1 by throughput (of 2)" in text
    assert "micro_batch=8, accumulation=2 (300" in text
    assert "200 ms" not in text


def test_a_plan_without_a_fit_says_so(plan):
    assert "Nothing fits." in report.render(report.plan_table(dataclasses.replace(plan, ranked=())))


def test_devices_in_a_list_and_one_with_every_source():
    device = catalog.device("rtx-3090")
    assert "RTX3090-24GB" in report.render(report.devices_table([device]), width=160)
    text = report.render(report.device_details(device), width=200)
    above = ""
    for name, origin in device.provenance.items():
        assert origin.kind.value in _row(text, name)
        assert ("(as above)" if origin.source == above else origin.source[:40]) in _row(text, name)
        above = origin.source
    assert "24.0 GiB" in _row(text, "memory.capacity_bytes")
    assert "936 GB/s" in _row(text, "memory.bandwidth_bytes_per_s")
    assert "350 W" in _row(text, "power_w")
    assert "1.695 GHz" in _row(text, "clock_hz")


def test_origins_are_counted_and_what_is_recalled_is_named():
    device = catalog.device("rtx-2080-ti")
    text = report.render(report.origins_table([device]), width=200)
    recalled = [name for name, origin in device.provenance.items() if origin.recalled]
    assert recalled
    assert ", ".join(recalled) in _row(text, device.name)
    total = len(device.provenance)
    assert f"{len(recalled) / total:.0%} of all numbers" in _row(text, "all")
    assert str(total) in _row(text, "all")


def test_names_of_constants_may_hold_dots():
    device = dataclasses.replace(
        catalog.device("rtx-3090"),
        profile={"gemm.flops_per_s.fp32": 3e13},
        provenance={"profile.gemm.flops_per_s.fp32": Provenance(ValueKind.MEASUREMENT, "here")},
    )
    assert "30.0 TFLOP/s" in report.render(report.device_details(device), width=160)


def test_clusters_in_a_list_and_one_with_links_and_assumptions():
    cluster = catalog.cluster("dgx-h100")
    assert "8x H100-SXM5-80GB" in report.render(report.clusters_table([cluster]), width=160)
    text = report.render(report.cluster_details(cluster), width=200)
    assert "Link nvlink4 (per direction)" in text
    assert _row(text, "bandwidth_bytes_per_s")
    assert all(assumption[:60] in text for assumption in cluster.assumptions)


def test_workloads_in_a_list_and_one_with_its_layers():
    workload = catalog.workload("gpt2-small", seq_len=128)
    assert f"{workload.parameter_count:,}" in report.render(report.workloads_table([workload]), width=160)
    text = report.render(report.workload_details(workload), width=160)
    assert all(layer.name in text for layer in workload.layers)
    assert "source" in text


def test_rows_are_flat_and_carry_the_results_own_names(result):
    (row,) = report.to_rows([result])
    assert row["memory.allocated_bytes"] == result.memory.allocated_bytes
    assert row["breakdown_s.compute"] == result.breakdown_s["compute"]
    assert row["assumptions"] == "host power not counted"
    assert not any(isinstance(value, dict | list | tuple) for value in row.values())


def test_a_frame_is_made_of_the_rows(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    assert report.to_frame([result, result]) == report.to_rows([result, result])


def test_without_pandas_the_error_says_what_to_do(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"to_frame needs pandas.*pip install pandas, or use to_rows"):
        report.to_frame([result])


def test_no_public_name_is_a_module_of_the_package():
    import pkgutil

    assert not {m.name for m in pkgutil.iter_modules(report.__path__)} & set(report.__all__)
    assert all(callable(getattr(report, name)) for name in report.__all__)
    assert dir(report) == report.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'plot_everything'"):
        report.plot_everything  # noqa: B018
