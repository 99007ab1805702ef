"""RMS norm as PyTorch composes it on a CPU, where no fused operator exists: which operators run, and what each keeps.

Order and lifetimes are those of a recorded step of PyTorch 2.13 in fp32; the temporaries of one C++ expression live until it ends.
"""

from __future__ import annotations

from simtrain.core.polynomial import Polynomial
from simtrain.core.precision import DTypeRole
from simtrain.core.workload import Operator, OperatorKind, Tensor

HIGH, FP32 = DTypeRole.HIGH, DTypeRole.FP32
_E, _R = OperatorKind.ELEMENTWISE, OperatorKind.REDUCTION


def composed_rms_norm(x: str, weight: str, out: Tensor, statistic: Tensor) -> tuple[Operator, ...]:
    """Returns the forward pass: the reciprocal root of the mean square, times the input, times the weight.

    Args:
        x: Input.
        weight: Parameter.
        out: Result.
        statistic: The reciprocal root of every row.
    """
    wide, rows = out.elements, statistic.elements
    squares, mean, normal = f"{out.name}.squares", f"{out.name}.mean", f"{out.name}.normal"
    return (
        Operator(f"{out.name}.square", _E, (x,), (Tensor(squares, wide, HIGH),)),
        Operator(f"{out.name}.average", _R, (squares,), (Tensor(mean, rows, FP32),)),
        Operator(f"{out.name}.epsilon", _E, updates=(mean,)),
        Operator(f"{out.name}.rsqrt", _E, (mean, squares), (statistic,), partial=(squares,)),
        Operator(f"{out.name}.normalize", _E, (x, statistic.name), (Tensor(normal, wide, HIGH),)),
        Operator(f"{out.name}.weigh", _E, (normal, weight), (out,)),
    )


def composed_rms_norm_backward(
    x: str, weight: str, out: Tensor, statistic: Tensor, seed: str, gradients: tuple[Tensor, Tensor]
) -> tuple[Operator, ...]:
    """Returns the backward pass.

    Args:
        x: Input.
        weight: Parameter.
        out: Result of the forward pass.
        statistic: Of the forward pass.
        seed: Name of the result's gradient.
        gradients: Of input and weight.
    """
    wide, rows, at = out.elements, statistic.elements, f"{out.name}.d"

    def op(name: str, reads: tuple[str, ...], elements: Polynomial, *, kind: OperatorKind = _E, held: tuple[str, ...] = ()) -> Operator:
        role = HIGH if elements is wide else FP32
        return Operator(f"{at}.{name}", kind, (*reads, *held), (Tensor(f"{at}.{name}", elements, role),), partial=held)

    r, n = statistic.name, f"{out.name}.normal"
    return (
        op("weight", (seed, n), wide),
        op("normal", (seed, weight), wide),
        Operator(f"{at}.weight.sum", _R, (f"{at}.weight",), (gradients[1],)),
        op("products", (f"{at}.normal", x), wide),
        op("scaled", (f"{at}.normal", r), wide),
        op("root", (f"{at}.products",), rows, kind=_R, held=(f"{at}.normal",)),
        op("cube", (r,), rows),
        op("half", (f"{at}.root",), rows),
        op("mean", (f"{at}.half", f"{at}.cube"), rows, held=(f"{at}.root",)),
        op("spread", (f"{at}.mean",), wide),
        op("input", (x,), wide),
        op("twice", (f"{at}.input",), wide),
        op("squares", (f"{at}.spread", f"{at}.twice"), wide, held=(f"{at}.input",)),
        Operator(f"{at}.add", _E, (f"{at}.scaled", f"{at}.squares"), (gradients[0],)),
    )
