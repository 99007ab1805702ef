"""Plots and table of runs: what they show is what the result says."""

import dataclasses

import numpy as np
import pytest

import simtrain as st
from simtrain import report
from simtrain.core.errors import InputError
from simtrain.run.power_cap import CapLaw, cap_tradeoff

PRICE = st.StatePrice(10.0, 1024, 2048, 2048 * 4096, power_w=9e5, idle_power_w=2e5, usd_per_h=3000, name="big")
RAMP = st.Phase("ramp", steps=2000, price=dataclasses.replace(PRICE, step_time_s=6.0, samples_per_step=1024, tokens_per_step=1024 * 4096))


@pytest.fixture(scope="module")
def run():
    return st.simulate_run(
        PRICE,
        until=st.Target(loss=2.2),
        parameters=7e9,
        phases=[RAMP],
        faults=st.Faults(mtbf_h=3, slow=st.SlowFaults(20)),
        snapshots=st.Snapshots(stall_s=20),
        seeds=6,
    )


def test_the_run_ends_at_its_loss_and_batch(run):
    ax = report.plot_run(run)
    line = ax.lines[0]
    assert line.get_xdata()[-1] * 86400 == pytest.approx(run.time_s)
    assert line.get_ydata()[-1] == pytest.approx(2.2, abs=2e-3)
    assert {text.get_text().split(" ")[0] for text in ax.get_legend().get_texts()} == {"loss", "failure", "slow"}
    batch = ax.figure.axes[1].lines[0].get_ydata()
    assert set(batch) == {1024, 2048}


def test_without_a_law_it_draws_steps():
    result = st.simulate_run(PRICE, until=st.Target(steps=500))
    ax = report.plot_run(result)
    assert ax.get_ylabel() == "steps done"
    assert ax.lines[0].get_ydata()[-1] == 500


def test_the_waterfall_ends_at_the_total(run):
    ax = report.plot_goodput(run)
    *parts, total = ax.patches
    assert sum(p.get_width() for p in parts) == pytest.approx(total.get_width())
    assert parts[-1].get_x() + parts[-1].get_width() == pytest.approx(total.get_width())
    assert len(report.plot_goodput([run, run]).containers) == len([v for v in run.split_s.values() if v])


def test_finishing_dates_are_the_seeds(run):
    ax = report.plot_finish(run)
    assert np.allclose(np.array(ax.lines[0].get_xdata()) * 86400, sorted(run.times_s))
    with pytest.raises(InputError, match="two seeds"):
        report.plot_finish(st.simulate_run(PRICE, until=st.Target(steps=5)))


def test_the_trade_off_draws_runs_and_caps(run):
    law = CapLaw(700, 200, 0.8)
    caps = cap_tradeoff(PRICE, law, [300, 400, 500, 600, 700])
    ax = report.plot_tradeoff(caps)
    assert len(ax.collections[1].get_offsets()) == sum(p.on_frontier for p in caps)
    dear = dataclasses.replace(run, cost_usd=run.cost_usd * 2)
    ax = report.plot_tradeoff({"cheap": run, "dear": dear})
    assert [len(c.get_offsets()) for c in ax.collections] == [1, 1]
    for empty in ({}, []):
        with pytest.raises(InputError):
            report.plot_tradeoff(empty)


def test_the_table_names_every_part(run):
    text = report.render(report.run_table(run))
    for word in ("goodput", "recomputed", "snapshot", "restart", "slowed", "loss", "kWh", "Hoffmann", "p90"):
        assert word in text


def test_a_batch_law_shows_its_runs_and_what_lies_beyond_them():
    ax = report.plot_batch_law([32, 64, 128, 256], [10_400, 5_600, 3_150, 1_900])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"runs", "extrapolated", "noise scale", "90 % interval"} <= set(labels)
    beyond = next(line for line in ax.get_lines() if line.get_label() == "extrapolated")
    assert beyond.get_xdata().max() > 256
    with pytest.raises(InputError, match="three different"):
        report.plot_batch_law([32, 64], [2, 1])
