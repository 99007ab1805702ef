"""How far rounding takes gradients from exact ones, from the operator lists: an estimate that knows formats and lengths of sums alone.

Each tensor that is stored in a format adds a relative error of that format. Rounding to nearest with unit roundoff u is off by at most u
and, for significands spread logarithmically, by u sqrt(1 / (8 ln 2)) in the root mean square. Sums over k terms in fp32 add k squared
roundoffs of fp32 (errors grow as the root of the length; Higham 2002, Accuracy and Stability of Numerical Algorithms, and Higham and
Mary 2019 on probabilistic bounds; recalled, not looked up). Roundings are taken as independent, so that squares add, and each is taken to
move the gradients by as much as it moves its own tensor. Residual streams dilute what one branch adds, so that the estimate tends to be
too large; it is an estimate of a root mean square, not a worst case.

In fp16, what is smaller than half its least number vanishes, and what lies below its least normal number keeps an absolute error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from simtrain.core.errors import InputError
from simtrain.core.precision import DType, DTypeRole
from simtrain.core.workload import Operator, OperatorKind
from simtrain.step.specialize import ConcreteLayer

UNIT_ROUNDOFF = {DType.FP32: 2.0**-24, DType.TF32: 2.0**-11, DType.BF16: 2.0**-8, DType.FP16: 2.0**-11}
"""Half the distance of 1 to the next number of each format (significands of 24, 11, 8 and 11 bits)."""

MEAN_SQUARE = 1 / (8 * math.log(2))
"""Mean squared relative error of rounding in units of the squared unit roundoff: u^2/3 times the mean of 1/m^2 for m in [1, 2)."""

FP16_LEAST_NORMAL, FP16_LEAST = 2.0**-14, 2.0**-24

_PRODUCTS = (OperatorKind.GEMM, OperatorKind.BATCHED_GEMM, OperatorKind.ATTENTION, OperatorKind.ATTENTION_BACKWARD)


def variance(dtype: DType) -> float:
    """Mean squared relative error of one rounding; 0 of formats that are no rounding of numbers (indices, masks)."""
    return MEAN_SQUARE * UNIT_ROUNDOFF.get(dtype, 0.0) ** 2


def layer_variance(concrete: ConcreteLayer, batch: int, sequence: int) -> float:
    """Squared relative error that one layer adds to the gradients of a model.

    Args:
        concrete: The layer in its formats.
        batch: Samples of a micro-batch.
        sequence: Sequence length.
    """
    passing = sum(_operator_variance(op, concrete, batch, sequence) for op in concrete.forward + concrete.backward)
    return passing + variance(concrete.precision.low)  # gradients of its own weights are rounded once and go no further


def _operator_variance(op: Operator, concrete: ConcreteLayer, batch: int, sequence: int) -> float:
    stored = [w for w in op.writes if not w.name.startswith("grad:")]
    total = sum(variance(concrete.dtype(w.name)) for w in stored if w.role is not DTypeRole.FP32)
    if op.kind not in _PRODUCTS or not op.dims or not stored:
        return total
    attention = op.kind in (OperatorKind.ATTENTION, OperatorKind.ATTENTION_BACKWARD)
    if attention:
        total += variance(concrete.precision.low)  # probabilities, which are not stored
    if concrete.precision.arithmetic is DType.TF32:
        total += 2 * variance(DType.TF32)  # both operands on their way into the product
    length = op.dims[2 if attention else 3].size(batch, sequence)
    return total + length * variance(DType.FP32)


@dataclass(frozen=True, slots=True)
class Exponents:
    """Magnitudes of gradients that reach a layer, in powers of two.

    Attributes:
        counts: Elements by exponent e, with magnitudes in [2^e, 2^(e+1)); zeros are left out.
        scale: What the loss was multiplied by when they were counted.
    """

    counts: Mapping[int, float]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.counts or any(n < 0 for n in self.counts.values()) or not sum(self.counts.values()) > 0 or not self.scale > 0:
            raise InputError(f"Exponents: counts must be elements by exponent, at least one above zero, and scale positive: {self!r}")

    def underflow(self, loss_scale: float) -> float:
        """Share of elements that become zero in fp16."""
        lost = sum(n * (2.0**e * 1.5 * loss_scale / self.scale < FP16_LEAST / 2) for e, n in self.counts.items())
        return lost / sum(self.counts.values())

    def variance(self, loss_scale: float) -> float:
        """Squared relative error of the gradients (in the Euclidean norm) that fp16's lower end adds."""
        total = error = 0.0
        for exponent, count in self.counts.items():
            magnitude = 2.0**exponent * 1.5 * loss_scale / self.scale
            total += count * magnitude**2
            if magnitude < FP16_LEAST_NORMAL:
                error += count * min(magnitude**2, FP16_LEAST**2 / 12)
        return error / total


__all__ = ["UNIT_ROUNDOFF", "Exponents", "layer_variance", "variance"]
