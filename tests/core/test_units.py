import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from simtrain.core.errors import QuantityError
from simtrain.core.units import DIMENSIONS, format_bytes, format_flops, format_rate, format_time, parse_quantity


@pytest.mark.parametrize(
    ("text", "dimension", "expected"),
    [
        ("80 GiB", "B", 80 * 2**30),
        ("80GB", "B", 80e9),
        ("1_000 kB", "B", 1e6),
        ("512 b", "B", 64),
        ("3.35 TB/s", "B/s", 3.35e12),
        ("100 Gb/s", "B/s", 12.5e9),
        ("100 Gbit/s", "B/s", 12.5e9),
        ("100 Gbps", "B/s", 12.5e9),
        ("312 TFLOP/s", "FLOP/s", 3.12e14),
        ("312 TFLOPS", "FLOP/s", 3.12e14),
        ("1 PFLOPs", "FLOP/s", 1e15),
        ("5 us", "s", 5e-6),
        ("5 µs", "s", 5e-6),
        ("1.5 h", "s", 5400),
        ("1.7 GHz", "Hz", 1.7e9),
        ("350 W", "W", 350),
        ("0.35 kW", "W", 350),
        ("1.79 USD/h", "USD/h", 1.79),
        ("$1.79", "USD/h", None),
        ("1.79 $/h", "USD/h", 1.79),
        ("82", "1", 82),
        (82, "1", 82),
        (".5", "1", 0.5),
        ("1e3 ms", "s", 1.0),
    ],
)
def test_reads_a_quantity_in_si_units(text, dimension, expected):
    if expected is None:
        with pytest.raises(QuantityError, match="cannot read"):
            parse_quantity(text, dimension)
    else:
        assert parse_quantity(text, dimension) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dimension", [d for d in DIMENSIONS if d != "1"])
def test_a_number_without_a_unit_is_refused_and_the_unit_is_shown(dimension):
    with pytest.raises(QuantityError, match="has no unit: expected") as caught:
        parse_quantity("80", dimension)
    assert DIMENSIONS[dimension] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("80 GB/s", "B"),
        ("80 GB", "B/s"),
        ("80 mB", "B"),
        ("312 TB", "FLOP/s"),
        ("5 GHz", "s"),
        ("5 %", "1"),
        ("350 kB", "W"),
        ("1 EUR/h", "USD/h"),
    ],
)
def test_a_unit_of_another_dimension_is_named(text, dimension):
    with pytest.raises(QuantityError, match="does not fit: expected"):
        parse_quantity(text, dimension)


@pytest.mark.parametrize("text", ["", "many GB", "GB", "nan GB", "--5 GB", True, False])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(QuantityError, match="cannot read"):
        parse_quantity(text, "B")


@pytest.mark.parametrize("text", ["0 GB", "-5 GB", "1e999 GB"])
def test_values_out_of_range_are_refused(text):
    with pytest.raises(QuantityError, match="must be above zero"):
        parse_quantity(text, "B")


def test_zero_and_negative_values_can_be_allowed_but_not_infinity():
    assert parse_quantity("0 us", "s", positive=False) == 0
    assert parse_quantity("-1 us", "s", positive=False) == -1e-6
    with pytest.raises(QuantityError, match="must be finite"):
        parse_quantity("1e999 us", "s", positive=False)


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (format_bytes, 2**30, "1.00 GiB"),
        (format_bytes, 0, "0 B"),
        (format_time, 0, "0 s"),
        (format_time, 2e-11, "0.02 ns"),
        (format_bytes, 1012 * 2**30, "1012 GiB"),
        (format_bytes, 512, "512 B"),
        (format_bytes, -(2**31), "-2.00 GiB"),
        (format_bytes, 1024**2 - 1, "1.00 MiB"),
        (format_rate, 3.35e12, "3.35 TB/s"),
        (format_time, 0.0123, "12.3 ms"),
        (format_time, 0.9999, "1.00 s"),
        (format_time, 9.999e-3, "10.0 ms"),
        (format_time, 90, "90.0 s"),
        (format_time, 7200, "2.00 h"),
        (format_time, 12 * 86400, "12.0 d"),
        (format_flops, 3.12e14, "312 TFLOP/s"),
    ],
)
def test_writes_three_significant_digits_in_a_fitting_unit(write, value, expected):
    assert write(value) == expected


@given(some.floats(min_value=1e-9, max_value=1e9, allow_nan=False))
def test_a_written_time_is_read_back_to_three_digits(time_s):
    assert parse_quantity(format_time(time_s), "s") == pytest.approx(time_s, rel=5.1e-3)


@given(some.floats(min_value=1, max_value=1e17))
def test_a_written_size_is_read_back_to_three_digits(size_bytes):
    assert parse_quantity(format_bytes(size_bytes), "B") == pytest.approx(size_bytes, rel=5.1e-3)


@given(some.floats(min_value=1e-3, max_value=1e6), some.sampled_from(["", "k", "M", "G", "T", "P"]))
def test_decimal_prefixes_are_powers_of_a_thousand(value, prefix):
    factor = 1000.0 ** ["", "k", "M", "G", "T", "P"].index(prefix)
    assert math.isclose(parse_quantity(f"{value!r} {prefix}B", "B"), value * factor, rel_tol=1e-12)
