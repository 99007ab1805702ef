"""The closed form of a transformer's training step: three layers (embedding, block, head) as operator lists.

The lists equal what the module in `module.py` makes PyTorch do, operator by operator and allocation by allocation. Names starting with
`input:` are the batch (token ids and targets), held by the caller; names starting with `shared:` cross layers.
"""

from __future__ import annotations

from collections.abc import Iterable

from simtrain.core.polynomial import ONE, B, Polynomial
from simtrain.core.precision import DTypeRole
from simtrain.core.workload import Form, Layer, Operator, OperatorKind, Role, Tensor, TensorKind, Workload
from workloads.common.parallel import Product, column_parallel, sum_partial
from workloads.common.pieces import HIGH, Axis, add, dropout, linear, multiply, norm, unary
from workloads.common.tape import Tape
from workloads.transformer.attention import attention, leave
from workloads.transformer.loss import lm_head, span_head
from workloads.transformer.part import Part
from workloads.transformer.spec import TransformerSpec


def workload(
    spec: TransformerSpec, *, name: str = "transformer", description: str = "", source: str = "", form: Form | None = None
) -> Workload:
    """Returns the workload of a spec.

    Args:
        spec: The model.
        name: Of the workload.
        description: One line.
        source: Where the numbers come from.
        form: One rank's part of it; the whole model by default.

    Raises:
        StrategyError: The model cannot be divided so.
    """
    part = Part(spec, form or Form())
    targets = 2 * B if spec.head == "span" else part.tokens
    return Workload(
        name,
        (embedding(part), block(part), head(part)),
        spec.sequence,
        input_bytes=8 * (part.tokens + targets),
        description=description,
        source=source,
        reform=lambda form: workload(spec, name=name, description=description, source=source, form=form),
    )


def embedding(part: Part) -> Layer:
    """Token, position and segment tables, summed (and, where norms stand behind, normalized)."""
    spec, tokens = part.spec, part.tokens
    tape = Tape(Tensor("input:ids", tokens, DTypeRole.INDEX, TensorKind.INPUT))
    wide = part.resident * spec.hidden
    tied = part.tied and spec.head == "lm"
    x = _lookup(tape, "wte", (part.vocabulary, spec.hidden), "input:ids", tokens * spec.hidden, tied=tied)
    if not part.whole:
        x = sum_partial(tape, x, "wte.own", part.form)
    if spec.positions == "learned":
        positions = Tensor("positions", part.sequence, DTypeRole.INDEX, TensorKind.INPUT)
        tape.run(Operator("positions", OperatorKind.ELEMENTWISE, (), (positions,)))
        held = part.sequence * (1 / part.form.tensor) if part.form.sequence_parallel else part.sequence
        rows = _lookup(tape, "wpe", (spec.max_positions, spec.hidden), "positions", held * spec.hidden)
        x = _add_to_every_sample(tape, x, rows, "positioned")
    if spec.token_types:
        types = Tensor("types", part.resident, DTypeRole.INDEX, TensorKind.INPUT)
        tape.run(Operator("types", OperatorKind.ELEMENTWISE, (), (types,)), holds=(x,))
        rows = _lookup(tape, "token_type", (spec.token_types, spec.hidden), "types", wide, holds=(x,))
        x = add(tape, x, rows, "typed")
    if spec.norm_position == "post" or spec.embedding_norm:
        x = _normalize(tape, x, "norm", "normalized", part)
    x = dropout(tape, x, "dropped", spec.dropout)
    if spec.positions == "rotary":
        tape.buffer(4 * spec.max_positions * spec.size_of_head)  # the table of rotations, which all blocks share
    return tape.layer("embedding", out=x, cut=wide, inputs=False)


def block(part: Part) -> Layer:
    """Attention and feed-forward part, each added to the residual stream."""
    spec, wide = part.spec, part.resident * part.spec.hidden
    tape = Tape(Tensor("x", wide, HIGH))
    if spec.norm_position == "pre":
        _normalize(tape, "x", "norm_1", "n1", part)
        attention(tape, "n1", "a", part)
        add(tape, "x", dropout(tape, "a", "a.dropped", spec.dropout), "x1")
        _normalize(tape, "x1", "norm_2", "n2", part)
        feed_forward(tape, "n2", "m", part)
        add(tape, "x1", dropout(tape, "m", "m.dropped", spec.dropout), "y", holds=("x",))
    else:
        attention(tape, "x", "a", part)
        add(tape, "x", dropout(tape, "a", "a.dropped", spec.dropout), "r1")
        _normalize(tape, "r1", "norm_1", "x1", part)
        feed_forward(tape, "x1", "m", part)
        add(tape, "x1", dropout(tape, "m", "m.dropped", spec.dropout), "r2")
        _normalize(tape, "r2", "norm_2", "y", part, holds=("x", "x1"))
    return tape.layer("block", out="y", cut=wide, repeats=spec.layers, block=True)


def feed_forward(tape: Tape, x: str, out: str, part: Part) -> str:
    """Two matrices around an activation, or three with a gate."""
    spec = part.spec
    hidden, inner = Axis(Role.HIDDEN, spec.hidden), Axis(Role.FFN, part.ffn_width)
    gated = spec.activation == "swiglu"
    if not part.whole:
        first = [Product("mlp.gate", "g", inner, spec.bias), Product("mlp.up", "u", inner, spec.bias)]
        chosen = first if gated else [Product("mlp.fc1", "f", inner, spec.bias)]
        column_parallel(tape, x, chosen, tokens=part.tokens, inner=hidden, form=part.form)
    elif not gated:
        linear(tape, x, "mlp.fc1", "f", tokens=part.tokens, inner=hidden, outer=inner, bias=spec.bias)
    if gated:
        if part.whole:
            linear(tape, x, "mlp.gate", "g", tokens=part.tokens, inner=hidden, outer=inner, bias=spec.bias)
        unary(tape, "g", "silu", "s")
        if part.whole:
            linear(tape, x, "mlp.up", "u", tokens=part.tokens, inner=hidden, outer=inner, bias=spec.bias, holds=("s",))
        multiply(tape, "s", "u", "act")
    else:
        unary(tape, "f", "relu_squared" if spec.activation == "relu-squared" else "gelu", "act")
    last = "mlp.down" if gated else "mlp.fc2"
    return leave(tape, "act", last, out, inner, part, holds=(x,))


def head(part: Part) -> Layer:
    """Last norm (where norms stand before), projection and loss; `y` is the loss."""
    tape = Tape(Tensor("x", part.resident * part.spec.hidden, HIGH))
    x = _normalize(tape, "x", "norm", "n", part) if part.spec.norm_position == "pre" else "x"
    (span_head if part.spec.head == "span" else lm_head)(tape, x, part)
    return tape.layer("head", out="y", cut=ONE, seed="dloss")


def _normalize(tape: Tape, x: str, name: str, out: str, part: Part, *, holds: Iterable[str] = ()) -> str:
    spec = part.spec
    return norm(tape, x, name, out, tokens=part.resident, width=spec.hidden, rms=spec.norm == "rmsnorm", holds=holds)


def _lookup(
    tape: Tape, name: str, shape: tuple[int, int], indices: str, elements: Polynomial, *, tied: bool = False, holds: Iterable[str] = ()
) -> str:
    """Rows of a table. A tied table adds the head's part of its gradient, which allocates a third table."""
    table = tape.parameter(f"{name}.weight", *shape)
    out = Tensor(f"{name}.rows", elements, HIGH)
    gather = Operator(name, OperatorKind.EMBEDDING, (indices, table), (out,), partial=(table,), touched=elements)
    tape.run(gather, holds=holds)

    def node() -> None:
        gradient = tape.gradient_tensor(table)
        own = Tensor(f"{name}.own_gradient", gradient.elements, DTypeRole.GRADIENT, TensorKind.GRADIENT) if tied else gradient
        tape.run_backward(Operator(f"{name}.backward", OperatorKind.EMBEDDING_BACKWARD, (tape.gradient(out.name), indices), (own,)))
        if tied:
            tape.run_backward(Operator(f"{name}.add_gradients", OperatorKind.ELEMENTWISE, ("shared:dwte", own.name), (gradient,)))

    tape.node(node)
    return out.name


def _add_to_every_sample(tape: Tape, x: str, rows: str, out: str) -> str:
    """Adds rows that are the same for every sample; their gradient is a sum over the batch."""
    like = tape.tensors[x]
    tape.run(Operator(f"{out}.add", OperatorKind.ELEMENTWISE, (x, rows), (Tensor(out, like.elements, like.role),)))

    def node() -> None:
        drows = tape.gradient_tensor(rows)
        tape.run_backward(Operator(f"{out}.sum_over_batch", OperatorKind.REDUCTION, (tape.gradient(out),), (drows,)))
        tape.give(x, tape.gradient(out))
        tape.give(rows, drows.name)

    tape.node(node)
    return out
