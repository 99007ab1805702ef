"""The closed form of a vision transformer's training step: embedding, block and head as operator lists.

Blocks are those of the transformer family. The sequence length is the number of patches and the class token; it follows from the size
of the image. The lists equal what the module in `module.py` makes PyTorch do, operator by operator and allocation by allocation.
"""

from __future__ import annotations

from dataclasses import replace

from simtrain.core.errors import StrategyError
from simtrain.core.polynomial import ONE, B, Polynomial, S, as_polynomial
from simtrain.core.workload import Form, Layer, Operator, OperatorKind, Role, Tensor, Workload
from workloads.common.images import Filter, convolution, images
from workloads.common.loss import cross_entropy, start_backward
from workloads.common.pieces import FP32, HIGH, Axis, linear, norm
from workloads.common.tape import Tape
from workloads.transformer.operators import blocks
from workloads.transformer.part import Part
from workloads.vit.spec import VitSpec

TOKENS = B * S


def workload(spec: VitSpec, *, name: str = "vit", description: str = "", source: str = "", form: Form | None = None) -> Workload:
    """Returns the workload of a spec.

    Args:
        spec: The model.
        name: Of the workload.
        description: One line.
        source: Where the numbers come from.
        form: One rank's part of it; the whole model by default. Tensor parallelism divides the blocks and nothing else.

    Raises:
        StrategyError: The model cannot be divided so.
    """
    form = form or Form()
    if form.sequence_parallel or form.context > 1:
        raise StrategyError(f"{name}: the tokens of an image are not divided: use context=1 and sequence_parallel=false")
    stack = blocks(Part(replace(spec.transformer, head="lm"), form))
    return Workload(
        name,
        (embedding(spec), *stack, head(spec)),
        spec.tokens,
        "image",
        B * (4 * 3 * spec.image_size**2 + 8),
        description,
        source,
        reform=lambda form: workload(spec, name=name, description=description, source=source, form=form),
    )


def embedding(spec: VitSpec) -> Layer:
    """Patches as tokens (a convolution whose stride is its window), the class token before them, positions added."""
    tape = Tape(images(spec.image_size))
    token = tape.parameter("class_token", 1, 1, spec.hidden)
    positions = tape.parameter("positions", 1, spec.tokens, spec.hidden)
    kernel = Filter(3, spec.hidden, edge=spec.patch, stride=spec.patch, bias=True)
    convolution(tape, "input:images", "proj", "patches", kernel, pixels=spec.patches)
    wide = TOKENS * spec.hidden

    def expand() -> None:
        # token and patches get views of one gradient; that of the token is summed over the batch
        dtokens, dtoken = tape.gradient("tokens"), tape.gradient_tensor(token)
        tape.run_backward(
            Operator("class_token.sum", OperatorKind.REDUCTION, (dtokens,), (dtoken,), partial=(dtokens,), touched=B * spec.hidden)
        )

    tape.node(expand)
    high = tape.cast("patches", HIGH)
    tape.run(Operator("tokens", OperatorKind.COPY, (token, high), (Tensor("tokens", wide, HIGH),)), holds=("patches",))
    tape.node(lambda: tape.give(high, tape.gradient("tokens")))
    tape.run(Operator("y.add", OperatorKind.ELEMENTWISE, ("tokens", positions), (Tensor("y", wide, HIGH),)))

    def add() -> None:
        dpositions = tape.gradient_tensor(positions)
        tape.run_backward(Operator("positions.sum", OperatorKind.REDUCTION, (tape.gradient("y"),), (dpositions,)))
        tape.give("tokens", tape.gradient("y"))

    tape.node(add)
    return tape.layer("embedding", out="y", cut=wide, inputs=False)


def head(spec: VitSpec) -> Layer:
    """Last norm, classes from the class token, and the loss; `y` is the loss."""
    tape = Tape(Tensor("x", TOKENS * spec.hidden, HIGH))
    norm(tape, "x", "norm", "n", tokens=TOKENS, width=spec.hidden, rms=False)
    token = _select_later(tape, "n", B * spec.hidden)
    inner, outer = Axis(Role.HIDDEN, spec.hidden), Axis(Role.VOCABULARY, spec.classes)
    linear(tape, token, "linear", "logits", tokens=B, inner=inner, outer=outer, bias=True)
    high = tape.cast("logits", FP32)
    cross_entropy(tape, high, "", "y", rows=B, classes=as_polynomial(spec.classes), holds=(high, "n", "x"))
    start_backward(tape)
    layer = tape.layer("head", out="y", cut=ONE, seed="dloss")
    forward, backward = (tuple(_see_through(op, token, "n", B * spec.hidden) for op in ops) for ops in (layer.forward, layer.backward))
    return replace(layer, forward=forward, backward=backward)


def _select_later(tape: Tape, x: str, elements: Polynomial) -> str:
    """Names a view of a tensor; the gradient of the view is copied into zeros of the whole tensor's size."""
    view = f"{x}.class"
    tape.tensors[view] = Tensor(view, elements, tape.tensors[x].role)

    def node() -> None:
        dx = tape.gradient_tensor(x)
        tape.run_backward(Operator(f"{view}.backward", OperatorKind.COPY, (tape.gradient(view),), (dx,)))
        tape.give(x, dx.name)

    tape.node(node)
    return view


def _see_through(op: Operator, view: str, whole: str, elements: Polynomial) -> Operator:
    """Replaces reads of a view by partial reads of what it looks at."""
    if view not in op.reads:
        return op
    reads = tuple(dict.fromkeys(whole if name == view else name for name in op.reads))
    partial = tuple(dict.fromkeys(whole if name == view else name for name in (*op.partial, view)))
    return replace(op, reads=reads, partial=partial, touched=op.touched if view in op.partial else op.touched + elements)
