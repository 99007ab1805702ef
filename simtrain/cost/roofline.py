"""Array helpers that compute models share: how the times of overlapping resources combine.

A roofline takes the larger of compute time and memory time. Real kernels overlap the two imperfectly, and most near the ridge, so
models join them with a power mean: exponent 1 adds (no overlap), infinity takes the maximum (perfect overlap).
"""

from __future__ import annotations

import numpy as np

from simtrain.core.polynomial import FloatArray


def join(a: FloatArray | float, b: FloatArray | float, exponent: float) -> FloatArray:
    """Joins two times of overlapping work: `(a^p + b^p)^(1/p)`.

    Args:
        a: Times, s.
        b: Times, s.
        exponent: 1 adds, infinity takes the maximum; both times are lower bounds of the result for any exponent of at least 1.
    """
    high, low = np.maximum(a, b), np.minimum(a, b)
    if np.isinf(exponent):
        return np.asarray(high, dtype=np.float64)
    # Scaling by the larger one keeps tiny times (1e-9 s to the 8th power) from vanishing.
    ratio = np.divide(low, high, out=np.zeros(np.broadcast(low, high).shape), where=high > 0)
    return np.asarray(high * (1.0 + ratio**exponent) ** (1.0 / exponent), dtype=np.float64)


def soft_minimum(a: FloatArray | float, b: FloatArray | float, exponent: float) -> FloatArray:
    """Joins two rates that limit each other: never above either, `(a^-p + b^-p)^(-1/p)`."""
    return np.asarray(1.0 / join(1.0 / np.asarray(a, dtype=np.float64), 1.0 / np.asarray(b, dtype=np.float64), exponent), dtype=np.float64)


def roofline_s(flops: FloatArray, bytes_moved: FloatArray, flops_per_s: FloatArray | float, bytes_per_s: FloatArray | float) -> FloatArray:
    """Lower bound of kernel times: the larger of arithmetic at `flops_per_s` and traffic at `bytes_per_s`."""
    return np.maximum(flops / flops_per_s, bytes_moved / bytes_per_s)


def ceil_div(total: FloatArray, part: FloatArray | float) -> FloatArray:
    """Number of parts that cover a total: waves of blocks, tiles of a matrix."""
    return np.ceil(total / part)


def triangle_share(length: FloatArray) -> FloatArray:
    """Share of a square of side `length` on or below its diagonal: `(s + 1) / (2 s)`, the work of causal attention."""
    return (length + 1.0) / (2.0 * length)


def saturation(value: FloatArray, half: FloatArray | float) -> FloatArray:
    """Share `v / (v + half)` that grows from 0 to 1 and is one half at `half`: fixed costs spread over more work."""
    return value / (value + half)
