"""RMS norm as PyTorch composes it where no kernel of its own exists: on a CPU, and on CUDA before version 2.8.

In fp32 whatever the input: widened, squared, averaged, scaled by the reciprocal root, narrowed, multiplied by the weight; the casts fall
away where everything is fp32. Order and lifetimes are those of a recorded step of PyTorch 2.13 on a CPU in fp32; the temporaries of one
C++ expression live until it ends. Casts as in torchtitan's `RMSNorm` (torchtitan/models/norms.py, looked up); one kernel since
pytorch/pytorch pull request 153666 (May 2025).
"""

from __future__ import annotations

from simtrain.core.polynomial import Polynomial
from simtrain.core.precision import DTypeRole
from simtrain.core.workload import Operator, OperatorKind, Tensor

HIGH, FP32 = DTypeRole.HIGH, DTypeRole.FP32
_E, _R, _C = OperatorKind.ELEMENTWISE, OperatorKind.REDUCTION, OperatorKind.CAST


def composed_rms_norm(x: str, weight: str, out: Tensor, statistic: Tensor) -> tuple[Operator, ...]:
    """Returns the forward pass: the reciprocal root of the mean square, times the input, times the weight.

    Args:
        x: Input.
        weight: Parameter.
        out: Result.
        statistic: The reciprocal root of every row.
    """
    elements, rows = out.elements, statistic.elements
    wide, squares, mean, scaled, normal = (f"{out.name}.{part}" for part in ("wide", "squares", "mean", "scaled", "normal"))
    return (
        Operator(wide, _C, (x,), (Tensor(wide, elements, FP32),)),
        Operator(f"{out.name}.square", _E, (wide,), (Tensor(squares, elements, FP32),)),
        Operator(f"{out.name}.average", _R, (squares,), (Tensor(mean, rows, FP32),)),
        Operator(f"{out.name}.epsilon", _E, updates=(mean,)),
        Operator(f"{out.name}.rsqrt", _E, (mean, squares), (statistic,), partial=(squares,)),
        Operator(f"{out.name}.normalize", _E, (wide, statistic.name), (Tensor(scaled, elements, FP32),)),
        Operator(normal, _C, (scaled,), (Tensor(normal, elements, HIGH),)),
        Operator(f"{out.name}.weigh", _E, (normal, weight), (out,)),
    )


def composed_rms_norm_backward(
    weight: str, out: Tensor, statistic: Tensor, seed: str, gradients: tuple[Tensor, Tensor]
) -> tuple[Operator, ...]:
    """Returns the backward pass.

    Args:
        weight: Parameter.
        out: Result of the forward pass.
        statistic: Of the forward pass.
        seed: Name of the result's gradient.
        gradients: Of input and weight.
    """
    elements, rows, at = out.elements, statistic.elements, f"{out.name}.d"

    def op(
        name: str, reads: tuple[str, ...], size: Polynomial, *, kind: OperatorKind = _E, held: tuple[str, ...] = (), role: DTypeRole = FP32
    ) -> Operator:
        return Operator(f"{at}.{name}", kind, (*reads, *held), (Tensor(f"{at}.{name}", size, role),), partial=held)

    r, wide, normal = statistic.name, f"{out.name}.wide", f"{out.name}.normal"
    return (
        op("weight", (seed, normal), elements, role=HIGH),
        op("normal", (seed, weight), elements, role=HIGH),
        Operator(f"{at}.weight.sum", _R, (f"{at}.weight",), (gradients[1],)),
        op("wide", (f"{at}.normal",), elements, kind=_C),
        op("products", (f"{at}.wide", wide), elements),
        op("scaled", (f"{at}.wide", r), elements),
        op("root", (f"{at}.products",), rows, kind=_R, held=(f"{at}.wide",)),
        op("cube", (r,), rows),
        op("half", (f"{at}.root",), rows),
        op("mean", (f"{at}.half", f"{at}.cube"), rows, held=(f"{at}.root",)),
        op("spread", (f"{at}.mean",), elements),
        op("input", (wide,), elements),
        op("twice", (f"{at}.input",), elements),
        op("squares", (f"{at}.spread", f"{at}.twice"), elements, held=(f"{at}.input",)),
        op("add", (f"{at}.scaled", f"{at}.squares"), elements),
        Operator(f"{gradients[0].name}.narrow", _C, (f"{at}.add",), (gradients[0],)),
    )


__all__ = ["composed_rms_norm", "composed_rms_norm_backward"]
