"""Cross-entropy as eager PyTorch computes it.

Log-softmax keeps its result for the backward pass; both halves of the loss write a gradient as large as the logits.
"""

from __future__ import annotations

from simtrain.core.polynomial import ONE, Polynomial
from simtrain.core.workload import Dim, Operator, OperatorKind, Role, Tensor, TensorKind
from workloads.common.pieces import FP32
from workloads.common.tape import Tape


def cross_entropy(
    tape: Tape, x: str, prefix: str, out: str, *, rows: Polynomial, classes: Polynomial, holds: tuple[str, ...], logits: str | None = None
) -> None:
    """Log-softmax and negative log-likelihood.

    Args:
        tape: Where it is written.
        x: The tensor that holds the logits.
        prefix: Of the names of what it writes.
        out: Name of the loss.
        rows: Predictions.
        classes: Choices each.
        holds: Tensors that Python names keep alive until it returns.
        logits: Name of the view of `x` that gets the gradient; `x` itself by default.
    """
    view, likelihoods, weight = logits or x, f"{prefix}log_probabilities", f"{prefix}total_weight"
    one = Dim(Role.BATCH, ONE)
    dims = (one, Dim(Role.TOKENS, rows), one, Dim(Role.SEQUENCE if logits else Role.VOCABULARY, classes))
    written = Tensor(likelihoods, rows * classes, FP32, TensorKind.LOGITS)
    tape.run(Operator(f"{prefix}log_softmax", OperatorKind.SOFTMAX, (x,), (written,), dims=dims))
    scalars = (Tensor(out, ONE, FP32), Tensor(weight, ONE, FP32))
    pick = Operator(
        f"{prefix}nll_loss", OperatorKind.REDUCTION, (likelihoods, "input:targets"), scalars, partial=(likelihoods,), touched=rows
    )
    tape.run(pick, holds=holds)

    def softmax_node() -> None:
        dlogits = tape.gradient_tensor(view)
        reads = (tape.gradient(likelihoods), likelihoods)
        tape.run_backward(Operator(f"{prefix}log_softmax.backward", OperatorKind.SOFTMAX_BACKWARD, reads, (dlogits,), dims=dims))
        tape.give(view, dlogits.name)

    def loss_node() -> None:
        gradient = tape.gradient_tensor(likelihoods)
        reads = (tape.gradient(out), likelihoods, "input:targets", weight)
        tape.run_backward(Operator(f"{prefix}nll_loss.backward", OperatorKind.ELEMENTWISE, reads, (gradient,), partial=(likelihoods,)))
        tape.give(likelihoods, gradient.name)

    tape.node(softmax_node)
    tape.node(loss_node)


def start_backward(tape: Tape) -> None:
    """The gradient of the loss, one, that `loss.backward()` starts from."""
    tape.node(lambda: tape.run_backward(Operator("loss.one", OperatorKind.ELEMENTWISE, (), (Tensor("dloss", ONE, FP32),))))
