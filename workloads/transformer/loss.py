"""The last layer: projection to logits, and cross-entropy as eager PyTorch computes it.

The module converts logits to fp32 before the loss (as Megatron-LM and Hugging Face Transformers do). Log-softmax keeps its result for the
backward pass; both halves of the loss write a gradient as large as the logits.
"""

from __future__ import annotations

from simtrain.core.polynomial import ONE, B, Polynomial, S, as_polynomial
from simtrain.core.workload import Dim, Operator, OperatorKind, Role, Tensor, TensorKind
from workloads.transformer.pieces import FP32, Axis, linear
from workloads.transformer.spec import TransformerSpec
from workloads.transformer.tape import Tape

TOKENS = B * S


def lm_head(tape: Tape, x: str, spec: TransformerSpec) -> None:
    """Next-token prediction; a tied head hands its part of the table's gradient to the embedding as `shared:dwte`."""
    tied = {"tied_to": "embedding.wte.weight", "gradient": "shared:dwte"} if spec.tied_head else {}
    weight = tape.parameter("linear.weight", spec.vocabulary, spec.hidden, **tied)
    inner, outer = Axis(Role.HIDDEN, spec.hidden), Axis(Role.VOCABULARY, spec.vocabulary)
    linear(tape, x, "linear", "logits", tokens=TOKENS, inner=inner, outer=outer, bias=False, weight=weight, kind=TensorKind.LOGITS)
    high = tape.cast("logits", FP32)
    cross_entropy(tape, high, "", "y", rows=TOKENS, classes=as_polynomial(spec.vocabulary), holds=(high, "x"))
    _start_backward(tape)


def span_head(tape: Tape, x: str, spec: TransformerSpec) -> None:
    """Start and end of an answer: two scores per position, two losses over positions, averaged."""
    inner, outer = Axis(Role.HIDDEN, spec.hidden), Axis(Role.HIDDEN, 2)
    linear(tape, x, "linear", "logits", tokens=TOKENS, inner=inner, outer=outer, bias=spec.bias, kind=TensorKind.LOGITS)
    high = tape.cast("logits", FP32)
    _unbind_later(tape, high)
    for half in ("start", "end"):
        tape.tensors[f"{half}.logits"] = Tensor(f"{half}.logits", TOKENS, FP32, TensorKind.LOGITS)
        cross_entropy(tape, high, f"{half}.", f"{half}.loss", rows=B, classes=S, holds=(high,), logits=f"{half}.logits")
    _average(tape, high)
    _start_backward(tape)


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


def _unbind_later(tape: Tape, x: str) -> None:
    def node() -> None:
        gradient = tape.gradient_tensor(x)
        reads = tuple(tape.gradient(f"{half}.logits") for half in ("start", "end"))
        tape.run_backward(Operator("logits.stack", OperatorKind.COPY, reads, (gradient,)))
        tape.give(x, gradient.name)

    tape.node(node)


def _average(tape: Tape, held: str) -> None:
    total, mean = Tensor("loss.sum", ONE, FP32), Tensor("y", ONE, FP32)
    tape.run(Operator("loss.add", OperatorKind.ELEMENTWISE, ("start.loss", "end.loss"), (total,)), holds=(held,))
    tape.run(Operator("loss.halve", OperatorKind.ELEMENTWISE, (total.name,), (mean,)), holds=(held, "x"))

    def node() -> None:
        half = Tensor("dloss.half", ONE, FP32)
        tape.run_backward(Operator("loss.halve.backward", OperatorKind.ELEMENTWISE, (tape.gradient("y"),), (half,)))
        tape.give("start.loss", half.name)
        tape.give("end.loss", half.name)

    tape.node(node)


def _start_backward(tape: Tape) -> None:
    """The gradient of the loss, one, that `loss.backward()` starts from."""
    tape.node(lambda: tape.run_backward(Operator("loss.one", OperatorKind.ELEMENTWISE, (), (Tensor("dloss", ONE, FP32),))))
