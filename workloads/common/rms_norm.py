"""RMS norm without a kernel of its own: what PyTorch composed it of before version 2.8, in fp32 whatever its input.

Forward: widen, square, mean, add epsilon and take the reciprocal root, scale, narrow, multiply by the weight. Backward: the derivative of
each of these, with the two paths to the input summed in fp32. Sources: pytorch/pytorch, aten/src/ATen/native/layer_norm.cpp (`rms_norm`
as a composition, recalled) and tools/autograd/derivatives.yaml (recalled); pytorch/torchtitan, torchtitan/models/norms.py (`RMSNorm`,
looked up), which is the same composition; pytorch/pytorch pull request 153666 (one kernel, May 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.core.polynomial import Polynomial
from simtrain.core.precision import DTypeRole
from simtrain.core.workload import Operator, OperatorKind, Tensor

HIGH, FP32 = DTypeRole.HIGH, DTypeRole.FP32


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """An RMS norm over rows.

    Attributes:
        x: Its input.
        weight: Its parameter.
        out: Its result.
        rows: How many.
        elements: Of all of them.
    """

    x: str
    weight: str
    out: str
    rows: Polynomial
    elements: Polynomial

    def forward(self) -> tuple[Operator, ...]:
        """What the forward pass runs; it leaves the widened input, the reciprocal root and the narrowed quotient for backward."""
        wide, square, mean, root, scaled, narrow = (self._name(n) for n in ("wide", "square", "mean", "rstd", "scaled", "narrow"))
        return (
            self._pointwise("wide", (self.x,), kind=OperatorKind.CAST),
            self._pointwise("square", (wide,)),
            Operator(mean, OperatorKind.REDUCTION, (square,), (Tensor(mean, self.rows, FP32),)),
            Operator(root, OperatorKind.ELEMENTWISE, (mean,), (Tensor(root, self.rows, FP32),), launches=2),
            self._pointwise("scaled", (wide, root)),
            self._pointwise("narrow", (scaled,), HIGH, kind=OperatorKind.CAST),
            Operator(self.out, OperatorKind.ELEMENTWISE, (narrow, self.weight), (Tensor(self.out, self.elements, HIGH),)),
        )

    def backward(self, dout: str, dx: Tensor, dweight: Tensor) -> tuple[Operator, ...]:
        """What the backward pass runs.

        Args:
            dout: The gradient of the result.
            dx: That of the input.
            dweight: That of the parameter.
        """
        wide, root, narrow = (self._name(n) for n in ("wide", "rstd", "narrow"))
        own = {n: self._name(n) for n in ("weighted", "narrow.d", "wide.d", "rooted", "root.d", "spread", "power", "twice", "square.d")}
        return (
            self._pointwise("weighted", (dout, narrow), HIGH),
            Operator(f"{own['weighted']}.sum", OperatorKind.REDUCTION, (own["weighted"],), (dweight,)),
            self._pointwise("narrow.d", (dout, self.weight), HIGH),
            self._pointwise("wide.d", (own["narrow.d"],), kind=OperatorKind.CAST),
            self._pointwise("rooted", (own["wide.d"], wide)),
            Operator(own["root.d"], OperatorKind.REDUCTION, (own["rooted"], root), (Tensor(own["root.d"], self.rows, FP32),), launches=4),
            self._pointwise("scaled.d", (own["wide.d"], root)),
            self._pointwise("spread", (own["root.d"],)),
            self._pointwise("power", (wide,)),
            self._pointwise("twice", (own["power"],)),
            self._pointwise("square.d", (own["spread"], own["twice"])),
            self._pointwise("sum.d", (self._name("scaled.d"), own["square.d"])),
            Operator(f"{dx.name}.narrow", OperatorKind.CAST, (self._name("sum.d"),), (dx,)),
        )

    def _name(self, part: str) -> str:
        return f"{self.out}.{part}"

    def _pointwise(
        self, part: str, reads: tuple[str, ...], role: DTypeRole = FP32, *, kind: OperatorKind = OperatorKind.ELEMENTWISE
    ) -> Operator:
        return Operator(self._name(part), kind, reads, (Tensor(self._name(part), self.elements, role),))


__all__ = ["RmsNorm"]
