"""Trials on mixed machines: what rows mean, and that held-out predictions beat the models that came with them."""

import numpy as np
import pytest

from validation import mixed
from validation.kernels_published import load_table


def test_trials_divide_24_blocks_over_16_devices():
    for name, count in (("mixed", 24), ("t4", 47)):
        rows = mixed.trials(name)
        assert len(rows) == count
        for row in rows:
            assert sum(row["blocks"]) == 24
            assert row["data"] * row["tensor"] * row["pipeline"] == mixed.machines(name).size == 16
            assert row["micro_batches"] * row["data"] * row["micro_batch"] == 32


def test_rankings_of_amp_are_those_of_its_own_figures():
    rows = mixed.trials("mixed")
    measured = np.array([row["step_time_s"] for row in rows])
    own = mixed.Ranking.of(np.array([row["amp_s"] for row in rows]), measured)
    assert (own.rank_correlation, own.regret, own.errors.mean) == pytest.approx((0.369, 0.148, 0.512), abs=1e-3)


def test_constants_at_their_data_sheets_change_nothing():
    row = mixed.trials("mixed")[0]
    sheet = {"t4_clock": 1.0, "v100_clock": 1.0, "port_efficiency": 0.9, "t4_peers": 1.0, "step_s": 0.0, "divided_send_s": 0.0}
    assert mixed.predict_trial_s(row, sheet) == pytest.approx(mixed.predict_trial_s(row))
    assert mixed.predict_trial_s(row, sheet | {"t4_clock": 0.5}) > 1.1 * mixed.predict_trial_s(row)


def test_profiled_steps_beat_the_formula_that_came_with_the_profile():
    errors, rows = mixed.compare_steady()
    own = load_table("sailor_gh200")["sailor_error"]
    assert len(rows) == 15
    assert all(summary.mean < 0.75 * own for summary in errors.values())


def test_one_stage_and_one_replica_is_the_sum_of_its_layers():
    table = load_table("sailor_gh200")
    row = {"stages": [26], "data": 1, "micro_batch": 8, "global_batch": 32}
    (cells,) = (c for c in table["profile"] if c[0] == 8)
    passes = 4 * (cells[1] + 24 * cells[2] + cells[3]) * 1e-3
    update = mixed.profiled_s(table, row) - passes
    assert 7 * cells[5] / 4e12 < update < 7 * cells[5] / 3e12  # traffic at the bandwidth of a GH200


def test_nothing_fitted_orders_mixed_trials_better_than_what_came_with_them():
    rows = mixed.trials("mixed")
    measured = np.array([row["step_time_s"] for row in rows])
    found = mixed.Ranking.of(np.array([mixed.predict_trial_s(row) for row in rows]), measured)
    assert found.rank_correlation > 0.369
    assert found.regret < 0.148
    assert found.errors.mean < 0.5 * 0.512
