import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from simtrain.core.polynomial import ONE, ZERO, B, Polynomial, S, as_polynomial

coefficients = some.integers(-50, 50).map(float)
polynomials = some.dictionaries(some.tuples(some.integers(0, 2), some.integers(0, 2)), coefficients, max_size=4).map(
    lambda terms: sum((as_polynomial(c) * _power(B, i) * _power(S, j) for (i, j), c in terms.items()), ZERO)
)
sizes = some.integers(1, 16)  # small enough for exact arithmetic in doubles


def _power(base, exponent):
    result = ONE
    for _ in range(exponent):
        result = result * base
    return result


@given(polynomials, polynomials, sizes, sizes)
def test_sums_and_products_evaluate_like_numbers(p, q, b, s):
    assert (p + q)(b, s) == p(b, s) + q(b, s)
    assert (p * q)(b, s) == p(b, s) * q(b, s)


@given(polynomials, polynomials)
def test_order_does_not_matter_and_equal_polynomials_are_equal(p, q):
    assert p + q == q + p
    assert p * q == q * p
    assert hash(p + q) == hash(q + p)


@given(polynomials)
def test_zero_and_one_are_neutral(p):
    assert p + ZERO == p == p * ONE
    assert p + (-1) * p == ZERO == p * 0


def test_numbers_mix_in_from_both_sides():
    assert (3 * B + 2)(4, 99) == 14 == (2 + B * 3)(4, 99)
    assert as_polynomial(5)(7, 7) == 5
    assert as_polynomial(B) is B


def test_evaluates_whole_arrays():
    b = np.array([1.0, 2.0, 4.0])
    assert np.array_equal((2 * B * S * S)(b, 10.0), 200 * b)


def test_is_written_as_people_write_it():
    assert str(3 * B * S * S + 2) in ("2 + 3·B·S^2", "3·B·S^2 + 2")
    assert str(ZERO) == "0"


def test_terms_are_sorted_and_free_of_zeros():
    p = S + B + 0 * (B * S)
    assert p == Polynomial(tuple(sorted(p.terms)))
    assert all(c != 0 for _, _, c in p.terms)


def test_cannot_be_changed():
    with pytest.raises(AttributeError):
        B.terms = ()
