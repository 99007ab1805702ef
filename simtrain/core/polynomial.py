"""Counts as polynomials in the two sizes that a training step varies: batch and sequence length.

`3 * B * S * 768` is the element count of a fused query-key-value tensor of GPT-2 small, for every batch and length at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A polynomial in batch and sequence length.

    Attributes:
        terms: Sorted `(batch_power, sequence_power, coefficient)`, without zero coefficients.
    """

    terms: tuple[tuple[int, int, float], ...] = ()

    @overload
    def __call__(self, batch: float, sequence: float) -> float: ...
    @overload
    def __call__(self, batch: FloatArray, sequence: FloatArray | float) -> FloatArray: ...
    def __call__(self, batch: float | FloatArray, sequence: float | FloatArray) -> float | FloatArray:
        """Evaluates the polynomial; arrays broadcast."""
        total: float | FloatArray = 0.0
        for i, j, coefficient in self.terms:
            total = total + coefficient * batch**i * sequence**j
        return total

    def __add__(self, other: Polynomial | float) -> Polynomial:
        merged: dict[tuple[int, int], float] = {}
        for i, j, coefficient in self.terms + as_polynomial(other).terms:
            merged[i, j] = merged.get((i, j), 0.0) + coefficient
        return _from_dict(merged)

    def __mul__(self, other: Polynomial | float) -> Polynomial:
        merged: dict[tuple[int, int], float] = {}
        for i, j, a in self.terms:
            for k, m, b in as_polynomial(other).terms:
                merged[i + k, j + m] = merged.get((i + k, j + m), 0.0) + a * b
        return _from_dict(merged)

    __radd__ = __add__
    __rmul__ = __mul__

    def __str__(self) -> str:
        parts = [f"{c:g}" + "".join(f"·{n}" + (f"^{p}" if p > 1 else "") for n, p in (("B", i), ("S", j)) if p) for i, j, c in self.terms]
        return " + ".join(parts) or "0"


def as_polynomial(value: Polynomial | float) -> Polynomial:
    """Returns a constant as a polynomial, and a polynomial as it is."""
    return value if isinstance(value, Polynomial) else _from_dict({(0, 0): float(value)})


def _from_dict(coefficients: dict[tuple[int, int], float]) -> Polynomial:
    return Polynomial(tuple((i, j, c) for (i, j), c in sorted(coefficients.items()) if c != 0))


ZERO = Polynomial()
ONE = Polynomial(((0, 0, 1.0),))
B = Polynomial(((1, 0, 1.0),))
"""The batch (samples of one micro-batch)."""
S = Polynomial(((0, 1, 1.0),))
"""The sequence length."""
