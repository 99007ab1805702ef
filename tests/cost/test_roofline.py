"""The shared joins: between the maximum and the sum, and stable at any scale."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simtrain.cost.roofline import ceil_div, join, roofline_s, saturation, soft_minimum, triangle_share

QUICK = settings(max_examples=60, deadline=None)
TIMES = st.floats(min_value=1e-9, max_value=1e4)
EXPONENTS = st.floats(min_value=1.0, max_value=64.0)


@QUICK
@given(a=TIMES, b=TIMES, exponent=EXPONENTS)
def test_join_lies_between_the_maximum_and_the_sum(a, b, exponent):
    joined = float(join(a, b, exponent))
    assert max(a, b) * (1 - 1e-12) <= joined <= (a + b) * (1 + 1e-12)


@QUICK
@given(a=TIMES, b=TIMES, exponent=EXPONENTS)
def test_join_is_symmetric_and_homogeneous(a, b, exponent):
    assert float(join(a, b, exponent)) == pytest.approx(float(join(b, a, exponent)), rel=1e-12)
    assert float(join(1e3 * a, 1e3 * b, exponent)) == pytest.approx(1e3 * float(join(a, b, exponent)), rel=1e-9)


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 7.0), (2.0, 5.0), (np.inf, 4.0)])
def test_join_special_exponents(exponent, expected):
    assert float(join(3.0, 4.0, exponent)) == pytest.approx(expected)


def test_join_with_nothing_is_the_other():
    assert join(np.array([0.0, 0.0, 2.0]), np.array([0.0, 3.0, 0.0]), 8.0).tolist() == [0.0, 3.0, 2.0]


@QUICK
@given(a=TIMES, b=TIMES, exponent=EXPONENTS)
def test_soft_minimum_is_below_both(a, b, exponent):
    assert float(soft_minimum(a, b, exponent)) <= min(a, b) * (1 + 1e-12)


def test_roofline_takes_the_slower_resource():
    times = roofline_s(np.array([100.0, 1.0]), np.array([1.0, 100.0]), 10.0, 20.0)
    assert times.tolist() == [10.0, 5.0]


def test_ceil_div_counts_started_parts():
    assert ceil_div(np.array([1.0, 128.0, 129.0]), 128).tolist() == [1.0, 1.0, 2.0]


@QUICK
@given(length=st.integers(min_value=1, max_value=300))
def test_triangle_share_counts_the_lower_triangle(length):
    assert float(triangle_share(np.array(float(length)))) == pytest.approx(np.tri(length).sum() / length**2)


def test_saturation_is_one_half_at_its_half_value():
    assert saturation(np.array([0.0, 165.0]), 165.0).tolist() == [0.0, 0.5]
