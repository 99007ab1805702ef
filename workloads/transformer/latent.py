"""Multi-head latent attention: queries, keys and values made from narrow latent vectors (DeepSeek-AI 2024, DeepSeek-V2, section 2.1).

A part of each query, and one key for all heads, carry the position; the rest is not rotated. Tensor-parallel ranks make the latent vectors
each for itself and share what is made from them by heads, as Megatron-LM does (`multi_latent_attention.py`, recalled, not looked up).
"""

from __future__ import annotations

from simtrain.core.polynomial import Polynomial
from simtrain.core.workload import Operator, OperatorKind, Role, Tensor
from workloads.common.parallel import Product, column_parallel, gather_rows
from workloads.common.pieces import FP32, HIGH, LOW, Axis, linear, norm
from workloads.common.tape import Tape
from workloads.transformer.part import Part


def latent_operands(tape: Tape, x: str, part: Part) -> tuple[str, str, str]:
    """Queries, keys and values.

    Args:
        tape: Where they are written.
        x: Input of the attention.
        part: One rank's part of the model.
    """
    spec, form, heads = part.spec, part.form, part.heads
    low = tape.cast(x, LOW)
    queries = _latent(tape, low, "q", spec.query_rank, part)
    _up(tape, queries, [Product("attention.q_up", "q.plain", Axis(Role.HEADS, part.query_width + heads * spec.rotary_head), False)], part)
    _position(tape, "q.plain", "q", part)
    keys = _latent(tape, low, "kv", spec.kv_rank, part)
    rotary = Axis(Role.HEADS, spec.rotary_head)
    linear(
        tape, low, "attention.k_rotary", "k.rotary", tokens=part.resident, inner=Axis(Role.HIDDEN, spec.hidden), outer=rotary, bias=False
    )
    shared = gather_rows(tape, "k.rotary", form) if form.tensor > 1 else "k.rotary"
    wide = Axis(Role.HEADS, part.query_width)
    _up(tape, keys, [Product("attention.k_up", "k.plain", wide, False), Product("attention.v_up", "v", wide, False)], part)
    _join(tape, "k.plain", _turn(tape, shared, part), "k", part)
    return "q", "k", "v"


def _latent(tape: Tape, x: str, name: str, width: int, part: Part) -> str:
    """A narrow vector for every token, normalized."""
    hidden, inner = Axis(Role.HIDDEN, part.spec.hidden), Axis(Role.HEADS, width)
    linear(tape, x, f"attention.{name}_down", f"{name}.latent", tokens=part.resident, inner=hidden, outer=inner, bias=False)
    high, rms = tape.cast(f"{name}.latent", HIGH), part.spec.norm == "rmsnorm"
    return norm(tape, high, f"attention.{name}_norm", f"{name}.normed", tokens=part.resident, width=width, rms=rms)


def _up(tape: Tape, x: str, products: list[Product], part: Part) -> None:
    """What heads need, from a latent vector."""
    width = part.spec.query_rank if x == "q.normed" else part.spec.kv_rank
    inner = Axis(Role.HEADS, width)
    if not part.whole:
        column_parallel(tape, x, products, tokens=part.tokens, inner=inner, form=part.form)
        return
    for p in products:
        linear(tape, x, p.name, p.out, tokens=part.tokens, inner=inner, outer=p.outer, bias=False)


def _rotated(tape: Tape, x: str, elements: Polynomial, *, partial: bool) -> str:
    """What carries the position, rotated in fp32 and brought back to its own format."""
    high, turned, out = Tensor(f"{x}.high", elements, FP32), Tensor(f"{x}.turned.high", elements, FP32), f"{x}.turned"
    tape.run(Operator(high.name, OperatorKind.COPY, (x,), (high,), partial=(x,) if partial else (), touched=elements))
    tape.run(Operator(f"{x}.rotate", OperatorKind.ELEMENTWISE, (high.name,), (turned,)))
    tape.run(Operator(out, OperatorKind.CAST, (turned.name,), (Tensor(out, elements, LOW),)))
    return out


def _turned_back(gradient: str, name: str, elements: Polynomial, into: Tensor, *, partial: bool) -> list[Operator]:
    """The gradient of what was rotated."""
    high, back = Tensor(f"{name}.back.high", elements, FP32), Tensor(f"{name}.back", elements, FP32)
    return [
        Operator(high.name, OperatorKind.COPY, (gradient,), (high,), partial=(gradient,) if partial else (), touched=elements),
        Operator(f"{name}.rotate.backward", OperatorKind.ELEMENTWISE, (high.name,), (back,)),
        Operator(f"{name}.back.cast", OperatorKind.CAST, (back.name,), (into,)),
    ]


def _position(tape: Tape, x: str, out: str, part: Part) -> None:
    """Rotates a part of each query and puts both parts side by side again."""
    rotated = part.tokens * (part.heads * part.spec.rotary_head)
    turned = _rotated(tape, x, rotated, partial=True)
    whole = Tensor(out, tape.tensors[x].elements, LOW)
    tape.run(Operator(f"{out}.join", OperatorKind.COPY, (x, turned), (whole,), touched=whole.elements))

    def node() -> None:
        gradient, dx, inner = tape.gradient(out), tape.gradient_tensor(x), Tensor(f"{x}.inner", rotated, LOW)
        back = _turned_back(gradient, x, rotated, inner, partial=True)
        tape.run_backward(*back, Operator(f"{x}.rejoin", OperatorKind.COPY, (gradient, inner.name), (dx,)))
        tape.give(x, dx.name)

    tape.node(node)


def _turn(tape: Tape, x: str, part: Part) -> str:
    """Rotates the key that all heads share."""
    elements = part.tokens * part.spec.rotary_head
    out = _rotated(tape, x, elements, partial=False)

    def node() -> None:
        dx = tape.gradient_tensor(x)
        tape.run_backward(*_turned_back(tape.gradient(out), x, elements, dx, partial=False))
        tape.give(x, dx.name)

    tape.node(node)
    return out


def _join(tape: Tape, plain: str, shared: str, out: str, part: Part) -> None:
    """Puts the key that all heads share beside that of each head."""
    rotated = part.tokens * (part.heads * part.spec.rotary_head)
    tape.run(Operator(f"{out}.join", OperatorKind.COPY, (plain, shared), (Tensor(out, tape.tensors[plain].elements + rotated, LOW),)))

    def node() -> None:
        gradient, dplain, dshared = tape.gradient(out), tape.gradient_tensor(plain), tape.gradient_tensor(shared)
        tape.run_backward(
            Operator(f"{out}.split", OperatorKind.COPY, (gradient,), (dplain,), partial=(gradient,), touched=dplain.elements),
            Operator(f"{out}.sum", OperatorKind.REDUCTION, (gradient,), (dshared,), partial=(gradient,), touched=rotated),
        )
        tape.give(plain, dplain.name)
        tape.give(shared, dshared.name)

    tape.node(node)
