"""Reading and writing quantities: SI floats inside, units only where people read and write.

`parse_quantity("3.35 TB/s", "B/s")` gives `3.35e12`. Decimal prefixes are powers of 1000 (GB), binary ones of 1024 (GiB).
"""

from __future__ import annotations

import math
import re

from simtrain.core.errors import QuantityError

_DECIMAL = {"": 1.0, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0, "d": 86400.0}

DIMENSIONS: dict[str, str] = {
    "B": "a size, such as '80 GiB'",
    "B/s": "a data rate, such as '3.35 TB/s' or '100 Gb/s'",
    "FLOP/s": "a rate of arithmetic, such as '312 TFLOP/s'",
    "s": "a time, such as '5 us'",
    "Hz": "a frequency, such as '1.7 GHz'",
    "W": "a power, such as '350 W'",
    "USD/h": "a price, such as '1.79 USD/h'",
    "1": "a plain number, such as '82'",
}
"""What each dimension code means, with an example."""

_NUMBER = re.compile(r"^\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*?)\s*$")


def parse_quantity(text: str | float | int, dimension: str, *, positive: bool = True) -> float:
    """Reads a quantity with a unit and returns it in SI base units (bytes, bytes/s, FLOP/s, s, Hz, W, USD/h).

    Args:
        text: The quantity as written. A bare number is accepted only for dimension `"1"`.
        dimension: One of `DIMENSIONS`.
        positive: Refuse values that are not above zero.

    Raises:
        QuantityError: No number, no unit, a unit of another dimension, or a value out of range.
    """
    match = _NUMBER.match(str(text))
    expected = DIMENSIONS[dimension]
    if isinstance(text, bool) or match is None:
        raise QuantityError(f"cannot read {text!r} as a quantity: expected {expected}")
    value, unit = float(match.group(1).replace("_", "")), match.group(2)
    if not unit and dimension != "1":
        raise QuantityError(f"{text!r} has no unit: expected {expected}")
    factor = _factor(unit, dimension)
    if factor is None:
        raise QuantityError(f"unit {unit!r} of {text!r} does not fit: expected {expected}")
    value *= factor
    if not math.isfinite(value) or (positive and value <= 0):
        raise QuantityError(f"{text!r} must be {'above zero' if positive else 'finite'}: expected {expected}")
    return value


def _factor(unit: str, dimension: str) -> float | None:
    fixed = {"1": {"": 1.0}, "s": _TIME, "USD/h": {"USD/h": 1.0, "$/h": 1.0}}
    if dimension in fixed:
        return fixed[dimension].get(unit)
    if dimension == "B":
        return _bytes(unit)
    if dimension == "B/s":
        head, _, tail = unit.partition("/")
        return _bytes(head) if tail == "s" else _bytes(unit[:-2]) if unit.endswith("ps") else None
    suffixes = ("FLOP/s", "FLOPS", "FLOPs") if dimension == "FLOP/s" else (dimension,)
    suffix = next((s for s in suffixes if unit.endswith(s)), None)
    return None if suffix is None else _DECIMAL.get(unit[: -len(suffix)])


def _bytes(unit: str) -> float | None:
    for suffix, size in (("B", 1.0), ("bit", 0.125), ("b", 0.125)):
        if unit.endswith(suffix):
            prefix = unit[: -len(suffix)]
            scale = _BINARY.get(prefix, _DECIMAL.get(prefix))
            return None if scale is None or scale < 1 else scale * size
    return None


def format_bytes(size_bytes: float) -> str:
    """Writes a size in binary units: `format_bytes(2**30)` is `"1.00 GiB"`."""
    return _scaled(size_bytes, (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)))


def format_rate(rate_bytes_per_s: float) -> str:
    """Writes a data rate in decimal units: `format_rate(3.35e12)` is `"3.35 TB/s"`."""
    return _scaled(rate_bytes_per_s, (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3), ("B/s", 1.0)))


def format_time(time_s: float) -> str:
    """Writes a duration with a fitting unit: `format_time(0.0123)` is `"12.3 ms"`."""
    if abs(time_s) >= 5400:
        return _scaled(time_s, (("d", 86400.0),) if abs(time_s) >= 172800 else (("h", 3600.0),))
    return _scaled(time_s, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)))


def format_flops(rate_flops: float) -> str:
    """Writes a rate of arithmetic: `format_flops(3.12e14)` is `"312 TFLOP/s"`."""
    return _scaled(rate_flops, (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9), ("MFLOP/s", 1e6), ("FLOP/s", 1.0)))


def _scaled(value: float, scales: tuple[tuple[str, float], ...]) -> str:
    """Writes three significant digits, in the largest unit of which there is at least one after rounding."""
    if value == 0:
        return f"0 {next((name for name, scale in scales if scale == 1.0), scales[-1][0])}"
    rounded, name, scale = next(
        (item for item in ((float(f"{value / s:.3g}"), n, s) for n, s in scales) if abs(item[0]) >= 1),
        (value / scales[-1][1], *scales[-1]),
    )
    digits = 2 if abs(rounded) < 10 else 1 if abs(rounded) < 100 else 0
    return f"{value / scale:.{digits}f} {name}"
