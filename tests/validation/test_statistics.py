"""Statistics with answers known in closed form."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simtrain.core.errors import InputError
from validation.statistics import Choice, best_constant, choices, confusion, held_out_constants, interval_of_mean, regret

ratios = st.lists(st.floats(0.05, 20), min_size=1, max_size=12)


def loss(k: float, values: list[float]) -> float:
    return float(np.mean([abs(k * r - 1) for r in values]))


@given(ratios, st.floats(0.02, 50))
def test_no_constant_beats_the_best_one(values: list[float], other: float) -> None:
    assert loss(best_constant(values), values) <= loss(other, values) + 1e-12


def test_the_best_constant_of_equal_ratios_is_exact() -> None:
    assert best_constant([0.25] * 7) == 4.0


def test_the_best_constant_leans_to_large_ratios() -> None:
    # |k/2 - 1| + |2k - 1|: slopes 1/2 and 2, so the minimum is where the steep one vanishes.
    assert best_constant([0.5, 2.0]) == 0.5


def test_a_constant_needs_positive_ratios() -> None:
    with pytest.raises(InputError, match="above 0"):
        best_constant([1.0, 0.0])
    with pytest.raises(InputError, match="at least one"):
        best_constant([])


def test_held_out_constants_do_not_see_their_group_nor_other_pools() -> None:
    values = [1.0, 1.0, 0.5, 0.5, 0.1]
    pools = ["a", "a", "a", "a", "b"]
    groups = ["x", "x", "y", "y", "x"]
    assert held_out_constants(values, pools, groups) == [2.0, 2.0, 1.0, 1.0, None]


def test_an_interval_of_equal_values_is_a_point_and_two_groups_have_none() -> None:
    assert interval_of_mean([0.1] * 6, list("aabbcc")) == (pytest.approx(0.1), pytest.approx(0.1))
    assert interval_of_mean([0.1, 0.2], ["a", "b"]) is None


def test_the_interval_has_the_width_of_group_means() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.2, 0.05, 200)
    low, high = interval_of_mean(values, range(200)) or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.645 * values.std() / sqrt(200), rel=0.1)
    # rows that come in tens are ten times fewer facts
    wide_low, wide_high = interval_of_mean(np.repeat(values[:20], 10), np.repeat(np.arange(20), 10)) or (0.0, 0.0)
    assert wide_high - wide_low == pytest.approx(2 * 1.645 * values[:20].std() / sqrt(20), rel=0.2)


def test_regret_of_a_wrong_and_of_a_tied_pick() -> None:
    wrong = Choice((1.0, 2.0, 3.0), (12.0, 10.0, 15.0))
    assert (wrong.regret, wrong.hit) == (pytest.approx(0.2), 0.0)
    assert wrong.random_regret == pytest.approx((12 + 10 + 15) / 30 - 1)
    assert wrong.pairwise == (2.0, 3)
    tied = Choice((1.0, 1.0, 3.0), (12.0, 10.0, 15.0))
    assert (tied.regret, tied.hit) == (pytest.approx(0.1), 0.5)
    assert tied.pairwise == (2.5, 3)
    assert Choice((1.0, 2.0, 3.0), (2.0, 4.0, 9.0)).rank_correlation == pytest.approx(1.0)
    assert Choice((3.0, 2.0, 1.0), (2.0, 4.0, 9.0)).rank_correlation == pytest.approx(-1.0)
    assert Choice((1.0, 1.0), (2.0, 4.0)).rank_correlation is None


def test_a_choice_needs_two_alternatives() -> None:
    with pytest.raises(InputError, match="two alternatives"):
        Choice((1.0,), (1.0,))


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8, unique=True))
def test_a_perfect_prediction_regrets_nothing(measured: list[int]) -> None:
    choice = Choice(tuple(2 * m for m in measured), tuple(measured))
    assert choice.regret == 0
    assert choice.hit == 1
    right, pairs = choice.pairwise
    assert right == pytest.approx(pairs)


def test_the_summary_weighs_choices_equally() -> None:
    made = regret([Choice((1.0, 2.0, 3.0), (12.0, 10.0, 15.0)), Choice((1.0, 2.0), (1.0, 2.0))])
    assert made is not None
    assert (made.choices, made.best_found, made.mean, made.worst) == (2, 0.5, pytest.approx(0.1), pytest.approx(0.2))
    assert made.pairwise == pytest.approx(3 / 4)
    assert regret([]) is None
    assert "2 choices" in str(made)


def test_repeated_measurements_of_one_alternative_are_averaged() -> None:
    made = choices(["k"] * 4 + ["few"], ["a", "a", "b", "c", "a"], [1, 1, 2, 3, 1], [10.0, 14.0, 11.0, 20.0, 5.0])
    assert made == (Choice((1.0, 2.0, 3.0), (12.0, 11.0, 20.0)),)


def test_confusion_counts_all_four_cases() -> None:
    found = confusion([True, True, False, False, False], [True, False, True, False, False])
    assert (found.fits_right, found.over_wrong, found.fits_wrong, found.over_right) == (1, 1, 1, 2)
    assert str(found) == "1 of 2 that ran said to fit, 2 of 3 that ran out of memory said not to fit"
