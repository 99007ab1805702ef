"""The closed form of a transformer's training step: three layers (embedding, block, head) as operator lists.

The lists equal what the module in `module.py` makes PyTorch do, operator by operator and allocation by allocation. Names starting with
`input:` are the batch (token ids and targets), held by the caller; names starting with `shared:` cross layers.
"""

from __future__ import annotations

from collections.abc import Iterable

from simtrain.core.polynomial import ONE, B, Polynomial, S
from simtrain.core.precision import DTypeRole
from simtrain.core.workload import Layer, Operator, OperatorKind, Role, Tensor, TensorKind, Workload
from workloads.common.pieces import HIGH, Axis, add, dropout, linear, multiply, norm, unary
from workloads.common.tape import Tape
from workloads.transformer.attention import attention
from workloads.transformer.loss import lm_head, span_head
from workloads.transformer.spec import TransformerSpec

TOKENS = B * S


def workload(spec: TransformerSpec, *, name: str = "transformer", description: str = "", source: str = "") -> Workload:
    """Returns the workload of a spec.

    Args:
        spec: The model.
        name: Of the workload.
        description: One line.
        source: Where the numbers come from.
    """
    targets = 2 * B if spec.head == "span" else TOKENS
    layers = (embedding(spec), block(spec), head(spec))
    return Workload(name, layers, spec.sequence, input_bytes=8 * (TOKENS + targets), description=description, source=source)


def embedding(spec: TransformerSpec) -> Layer:
    """Token, position and segment tables, summed (and, where norms stand behind, normalized)."""
    tape = Tape(Tensor("input:ids", TOKENS, DTypeRole.INDEX, TensorKind.INPUT))
    wide = TOKENS * spec.hidden
    x = _lookup(tape, "wte", (spec.vocabulary, spec.hidden), "input:ids", wide, tied=spec.tied_head and spec.head == "lm")
    if spec.positions == "learned":
        tape.run(Operator("positions", OperatorKind.ELEMENTWISE, (), (Tensor("positions", S, DTypeRole.INDEX, TensorKind.INPUT),)))
        rows = _lookup(tape, "wpe", (spec.max_positions, spec.hidden), "positions", S * spec.hidden)
        x = _add_to_every_sample(tape, x, rows, "positioned")
    if spec.token_types:
        types = Tensor("types", TOKENS, DTypeRole.INDEX, TensorKind.INPUT)
        tape.run(Operator("types", OperatorKind.ELEMENTWISE, (), (types,)), holds=(x,))
        rows = _lookup(tape, "token_type", (spec.token_types, spec.hidden), "types", wide, holds=(x,))
        x = add(tape, x, rows, "typed")
    if spec.norm_position == "post":
        x = _normalize(tape, x, "norm", "normalized", spec)
    x = dropout(tape, x, "dropped", spec.dropout)
    return tape.layer("embedding", out=x, cut=wide, inputs=False)


def block(spec: TransformerSpec) -> Layer:
    """Attention and feed-forward part, each added to the residual stream."""
    tape = Tape(Tensor("x", TOKENS * spec.hidden, HIGH))
    if spec.norm_position == "pre":
        _normalize(tape, "x", "norm_1", "n1", spec)
        attention(tape, "n1", "a", spec)
        add(tape, "x", dropout(tape, "a", "a.dropped", spec.dropout), "x1")
        _normalize(tape, "x1", "norm_2", "n2", spec)
        feed_forward(tape, "n2", "m", spec)
        add(tape, "x1", dropout(tape, "m", "m.dropped", spec.dropout), "y", holds=("x",))
    else:
        attention(tape, "x", "a", spec)
        add(tape, "x", dropout(tape, "a", "a.dropped", spec.dropout), "r1")
        _normalize(tape, "r1", "norm_1", "x1", spec)
        feed_forward(tape, "x1", "m", spec)
        add(tape, "x1", dropout(tape, "m", "m.dropped", spec.dropout), "r2")
        _normalize(tape, "r2", "norm_2", "y", spec, holds=("x", "x1"))
    return tape.layer("block", out="y", cut=TOKENS * spec.hidden, repeats=spec.layers, block=True)


def feed_forward(tape: Tape, x: str, out: str, spec: TransformerSpec) -> str:
    """Two matrices around an activation, or three with a gate."""
    hidden, inner = Axis(Role.HIDDEN, spec.hidden), Axis(Role.FFN, spec.ffn_width)
    if spec.activation == "swiglu":
        linear(tape, x, "mlp.gate", "g", tokens=TOKENS, inner=hidden, outer=inner, bias=spec.bias)
        unary(tape, "g", "silu", "s")
        linear(tape, x, "mlp.up", "u", tokens=TOKENS, inner=hidden, outer=inner, bias=spec.bias, holds=("s",))
        multiply(tape, "s", "u", "act")
        last = "mlp.down"
    else:
        linear(tape, x, "mlp.fc1", "f", tokens=TOKENS, inner=hidden, outer=inner, bias=spec.bias)
        unary(tape, "f", "gelu", "act")
        last = "mlp.fc2"
    return linear(tape, "act", last, out, tokens=TOKENS, inner=inner, outer=hidden, bias=spec.bias, holds=(x,))


def head(spec: TransformerSpec) -> Layer:
    """Last norm (where norms stand before), projection and loss; `y` is the loss."""
    tape = Tape(Tensor("x", TOKENS * spec.hidden, HIGH))
    x = _normalize(tape, "x", "norm", "n", spec) if spec.norm_position == "pre" else "x"
    (span_head if spec.head == "span" else lm_head)(tape, x, spec)
    return tape.layer("head", out="y", cut=ONE, seed="dloss")


def _normalize(tape: Tape, x: str, name: str, out: str, spec: TransformerSpec, *, holds: Iterable[str] = ()) -> str:
    return norm(tape, x, name, out, tokens=TOKENS, width=spec.hidden, rms=spec.norm == "rmsnorm", holds=holds)


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
