"""The curve of time against memory: rules on or above it, and what is drawn."""

import matplotlib as mpl

import simtrain as st

mpl.use("agg")

WORKLOAD = {"layers": 6, "hidden": 512, "heads": 8, "vocabulary": 4096, "seq_len": 512}


def test_no_rule_lies_below_the_curve_and_all_are_drawn():
    curve = st.checkpoint_curve(st.workload("gpt", **WORKLOAD), "1x a100-sxm-80g", "micro_batch=8,precision=bf16-amp", budgets=5)
    times = [p.step_time_s for p in curve.optimal]
    assert times == sorted(times, reverse=True)
    for rule in curve.rules:
        best = min(p.step_time_s for p in curve.optimal if p.device_bytes <= rule.device_bytes * (1 + 1e-9))
        assert best <= rule.step_time_s * (1 + 1e-3)
    ax = st.report.plot_checkpoint_curve(curve)
    labels = {line.get_label() for line in ax.get_lines()}
    assert {"optimal (whole blocks)", "none", "every:2", "sqrt", "full"} <= labels
    assert ax.get_xlabel() == "device memory (GiB)"
