"""Fits of rows that were made from known constants."""

from collections.abc import Sequence

import numpy as np
import pytest

from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from simtrain.core.runtimes import runtime
from validation.fit_published import Constant, Values, Variant, fit_constants, hold_out, with_constants

WORK = np.array([1.0, 2.0, 4.0, 8.0, 1.0, 2.0, 4.0, 8.0, 16.0])
CALLS = np.array([10.0, 10.0, 10.0, 10.0, 80.0, 80.0, 80.0, 80.0, 80.0])
GROUPS = ["a", "a", "b", "b", "c", "c", "d", "d", "d"]
RATE, CALL = 0.5, 0.01
MEASURED = WORK / RATE + CALLS * CALL


def times(values: Values, rows: Sequence[int]) -> FloatArray:
    chosen = list(rows)
    return np.asarray(WORK[chosen] / values["rate"] + CALLS[chosen] * values["call"])


def constants(spread: float = 1.0) -> tuple[Constant, ...]:
    return (Constant("rate", 1.0, spread, 0.01, 10, "guess"), Constant("call", 0.03, spread, 1e-4, 1, "guess"))


@pytest.mark.parametrize("robust", [True, False])
def test_constants_that_made_the_rows_are_found(robust: bool) -> None:
    made = fit_constants(times, MEASURED, constants(spread=30.0), robust=robust)
    assert made.values["rate"] == pytest.approx(RATE, rel=1e-3)
    assert made.values["call"] == pytest.approx(CALL, rel=1e-2)
    assert made.errors.worst < 1e-3
    assert not made.at_limit


def test_groups_left_out_are_predicted_as_well_as_the_others_when_the_form_is_right() -> None:
    judged = hold_out(Variant(times, constants(30.0)), MEASURED, GROUPS, null_ratios=WORK / MEASURED)
    assert judged.errors.worst < 2e-3
    assert judged.null is not None
    assert judged.null.mean > 0.05
    low, high = judged.spread("rate")
    assert low <= RATE * 1.001
    assert high >= RATE * 0.999
    assert judged.to_dict()["skill"] > 0.95


def test_what_rows_say_nothing_about_stays_at_its_prior() -> None:
    unused = Constant("unused", 0.7, 0.2, 0.1, 2, "guess")
    made = fit_constants(times, MEASURED, (*constants(), unused))
    assert made.values["unused"] == pytest.approx(0.7)
    assert made.told["unused"] == pytest.approx(0.0, abs=1e-6)
    assert made.deviation["unused"] == pytest.approx(0.2)
    assert made.told["rate"] > 0.9


def test_one_constant_lands_where_prior_and_rows_weigh_alike() -> None:
    # n rows of log ratio log 2 with noise 0.05 against a prior of spread s: the optimum of (x - log 2)^2 n / 0.05^2 + x^2 / s^2.
    n, spread = 4, 0.025
    share = (n / 0.05**2) / (n / 0.05**2 + 1 / spread**2)
    made = fit_constants(
        lambda v, rows: np.full(len(rows), v["k"]), np.full(n, 2.0), [Constant("k", 1.0, spread, 0.1, 10, "")], robust=False
    )
    assert np.log(made.values["k"]) == pytest.approx(share * np.log(2), rel=1e-3)


def test_a_limit_that_holds_a_constant_is_named() -> None:
    bounded = (Constant("rate", 1.0, 30.0, 0.8, 10, "guess"), constants()[1])
    assert "rate" in fit_constants(times, MEASURED, bounded).at_limit


def test_a_single_anomaly_moves_a_robust_fit_less() -> None:
    spoilt = MEASURED.copy()
    spoilt[3] *= 3
    free = constants(30.0)
    robust, plain = (fit_constants(times, spoilt, free, robust=r).values["rate"] for r in (True, False))
    assert abs(np.log(robust / RATE)) < abs(np.log(plain / RATE)) / 2


def test_refusals() -> None:
    with pytest.raises(InputError, match="low <= prior"):
        Constant("x", 2.0, 1.0, 0.1, 1.0, "")
    with pytest.raises(InputError, match="two groups"):
        hold_out(Variant(times, constants()), MEASURED, ["a"] * 9)
    with pytest.raises(InputError, match="one time above 0"):
        fit_constants(lambda _, rows: np.zeros(len(rows)), MEASURED, constants())


def test_constants_reach_devices_links_and_runtime() -> None:
    values = {"device.bandwidth_hbm": 0.7, "runtime.launch_s": 9e-6, "link.infiniband-hdr.efficiency": 0.5, "own": 1.0}
    cluster, framework = with_constants(catalog.cluster("2x dgx-a100-80gb"), runtime("torch-eager"), values)
    assert cluster.size == 16
    assert cluster.devices[0].profile == {"bandwidth_hbm": 0.7}
    assert len(set(cluster.devices)) == 1
    assert (cluster.nodes[1].nic.efficiency, cluster.nodes[1].peer_link.efficiency) == (0.5, catalog.link("nvlink3").efficiency)
    assert framework.host.launch_s == 9e-6
    with pytest.raises(InputError, match="a link has no 'speed'"):
        with_constants(catalog.cluster("2x dgx-a100-80gb"), runtime("torch-eager"), {"link.infiniband-hdr.speed": 1.0})
