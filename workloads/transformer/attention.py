"""Attention as operators: projections, rotation of queries and keys, and the fused attention product.

FLOPs follow `torch.utils.flop_counter`: two matrix products forward; five backward for the fused kernel, because it computes the scores
anew. The unfused form (`unfused`) keeps the probabilities and needs four.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from simtrain.core.polynomial import ZERO, B, Polynomial, S, as_polynomial
from simtrain.core.workload import Collective, Dim, Operator, OperatorKind, Role, Tensor
from workloads.common.parallel import Product, column_parallel, row_parallel
from workloads.common.pieces import FP32, HIGH, LOW, Axis, linear, norm
from workloads.common.tape import Tape
from workloads.transformer.latent import latent_operands
from workloads.transformer.part import Part
from workloads.transformer.unfused import Operand, unfused_product


def attention(tape: Tape, x: str, out: str, part: Part) -> str:
    """Self-attention with its projections.

    One matrix for queries, keys and values is split by views, so that its gradient is one concatenation of three.
    """
    spec = part.spec
    if spec.kv_rank:
        return _latent(tape, x, out, part)
    q, k, v = _project(tape, x, part)
    if spec.qk_norm:
        q, k = _normalize_heads(tape, q, part.heads, part), _normalize_heads(tape, k, part.kv_width // spec.size_of_head, part)
    if spec.positions == "rotary":
        q, k = rotate(tape, q, part), rotate(tape, k, part)
    if part.form.context > 1 and part.form.context_style == "ulysses":
        inside = tuple(exchange(tape, n, f"{n}.by_head") for n in dict.fromkeys((q, k, v)))
        product(tape, inside * 3 if len(inside) == 1 else inside, "attended.by_head", part)
        exchange(tape, "attended.by_head", "attended")
    else:
        product(tape, (q, k, v), "attended", part)
    return leave(tape, "attended", "attention.proj", out, Axis(Role.HEADS, part.query_width), part, holds=(x, q, k, v))


def _latent(tape: Tape, x: str, out: str, part: Part) -> str:
    """Multi-head latent attention, always as one kernel."""
    q, k, v = latent_operands(tape, x, part)
    product(tape, (q, k, v), "attended", part)
    return leave(tape, "attended", "attention.proj", out, Axis(Role.HEADS, part.query_width), part, holds=(x, q, k, v))


def _project(tape: Tape, x: str, part: Part) -> tuple[str, str, str]:
    spec = part.spec
    hidden = Axis(Role.HIDDEN, spec.hidden)
    widths = (part.query_width, part.kv_width, part.kv_width)
    names = ("qkv",) if spec.fused_qkv else ("q", "k", "v")
    outs = (Axis(Role.HEADS, sum(widths)),) if spec.fused_qkv else tuple(Axis(Role.HEADS, w) for w in widths)
    if part.whole:
        for name, outer in zip(names, outs, strict=True):
            linear(tape, x, f"attention.{name}", name, tokens=part.tokens, inner=hidden, outer=outer, bias=spec.bias, joins="attention.qkv")
    else:
        products = [Product(f"attention.{name}", name, outer, spec.bias) for name, outer in zip(names, outs, strict=True)]
        column_parallel(tape, x, products, tokens=part.tokens, inner=hidden, form=part.form, joins="attention.qkv")
    return ("qkv", "qkv", "qkv") if spec.fused_qkv else ("q", "k", "v")


def leave(tape: Tape, x: str, name: str, out: str, inner: Axis, part: Part, *, holds: Iterable[str] = ()) -> str:
    """The product that leads from heads, or from the inner width of the feed-forward part, back to the residual stream."""
    hidden, bias = Axis(Role.HIDDEN, part.spec.hidden), part.spec.bias
    if part.whole:
        return linear(tape, x, name, out, tokens=part.tokens, inner=inner, outer=hidden, bias=bias, holds=holds)
    return row_parallel(tape, x, name, out, tokens=part.tokens, inner=inner, outer=hidden, bias=bias, form=part.form, holds=holds)


def exchange(tape: Tape, x: str, out: str) -> str:
    """Exchanges a piece of the sequence with all heads for the whole sequence with some of them, or back (DeepSpeed Ulysses)."""
    like = tape.tensors[x]
    tape.run(_all_to_all(x, Tensor(out, like.elements, like.role)))

    def node() -> None:
        dx = tape.gradient_tensor(x)
        tape.run_backward(_all_to_all(tape.gradient(out), dx))
        tape.give(x, dx.name)

    tape.node(node)
    return out


def _all_to_all(source: str, target: Tensor) -> Operator:
    name = f"{target.name}.all_to_all"
    return Operator(name, OperatorKind.COLLECTIVE, (source,), (target,), collective=Collective.ALL_TO_ALL, group="context")


def _pass_around(name: str, reads: tuple[str, ...], elements: Polynomial) -> Operator:
    """Keys and values (in backward also their gradients) of all ranks come by while attention runs (Ring Attention)."""
    return Operator(
        name,
        OperatorKind.COLLECTIVE,
        reads,
        partial=reads,
        touched=elements,
        collective=Collective.ALL_GATHER,
        group="context",
        overlaps=True,
    )


def _normalize_heads(tape: Tape, x: str, heads: int, part: Part) -> str:
    """A norm over the width of each head, with one set of weights for all heads; CUDA's autocast runs norms in fp32."""
    rows, rms = part.tokens * heads, part.spec.norm == "rmsnorm"
    out = norm(tape, tape.cast(x, HIGH), f"attention.{x}_norm", f"{x}.normed", tokens=rows, width=part.spec.size_of_head, rms=rms)
    return out if part.spec.positions == "rotary" else tape.cast(out, LOW, holds=(x,))


def rotate(tape: Tape, x: str, part: Part) -> str:
    """Rotary position embedding: pairs of neighbours as complex numbers (in fp32) times a table of rotations."""
    high = tape.cast(x, FP32)
    turned = Tensor(f"{x}.turned", tape.tensors[x].elements, FP32)
    tape.run(Operator(f"{x}.rotate", OperatorKind.ELEMENTWISE, (high,), (turned,)))

    def node() -> None:
        dx, back = tape.gradient_tensor(high), Tensor(f"{x}.rotation_back", part.sequence * part.spec.size_of_head, FP32)
        tape.run_backward(
            Operator(f"{x}.rotation_back", OperatorKind.ELEMENTWISE, (), (back,)),
            Operator(f"{x}.rotate.backward", OperatorKind.ELEMENTWISE, (tape.gradient(turned.name), back.name), (dx,)),
        )
        tape.give(high, dx.name)

    tape.node(node)
    return tape.cast(turned.name, LOW, holds=(x, high))


def product(tape: Tape, sources: tuple[str, ...], out: str, part: Part) -> str:
    """`softmax(Q K^T / sqrt(d)) V` as one kernel that keeps only the log-sum-exp of every row of scores."""
    spec, form = part.spec, part.form
    width, kv_width, extra = part.query_width, part.kv_width, spec.rotary_head
    # queries and keys may be wider than values
    head = as_polynomial(spec.size_of_head + extra / 2)
    tokens = part.tokens
    heads, queries, keys, causal = _shape(part)
    around = form.context > 1 and form.context_style != "ulysses"
    split = len(set(sources)) == 1
    gradients = (
        (Tensor("dq", tokens * width), Tensor("dk", tokens * kv_width), Tensor("dv", tokens * kv_width))
        if split
        else tuple(tape.gradient_tensor(n) for n in sources)
    )
    operands = {n: Operand(s, g.name, g.elements) for n, s, g in zip("qkv", sources, gradients, strict=True)}
    forward, backward = ((), ()) if form.context > 1 or extra else unfused_product(part, operands, out, f"d{out}")
    dims = (Dim(Role.HEADS, heads), Dim(Role.SEQUENCE, queries), Dim(Role.SEQUENCE, keys), Dim(Role.HEAD_DIM, head))
    # both products of a pass together; the fused kernel's way back has five of which one computes the scores anew
    products: Polynomial = 4 * (heads * queries * keys * head)
    kept = f"{out}.by_sample" if form.copies_attention else out
    outs = tuple(Tensor(n, tokens * width, LOW) for n in dict.fromkeys((kept, out)))
    written = (*outs, Tensor(f"{out}.log_sum_exp", heads * queries, FP32))
    reads = tuple(dict.fromkeys(sources))
    passed = (2 * kv_width + part.heads * extra) * tokens * form.context
    if around:
        tape.run(_pass_around("attention.keys", reads, passed))
    operator = Operator("attention", OperatorKind.ATTENTION, reads, written, dims=dims, flops=products, causal=causal)
    tape.run(replace(operator, unfused=forward))

    def node() -> None:
        if around:
            tape.run_backward(_pass_around("attention.keys.backward", reads, 2 * passed))
        operator = Operator(
            "attention.backward",
            OperatorKind.ATTENTION_BACKWARD,
            (tape.gradient(out), *reads, kept, f"{out}.log_sum_exp"),
            gradients,
            dims=dims,
            flops=2.5 * products,
            causal=causal,
            launches=3,
            workspace=_workspace(part, heads, queries),
            unfused=backward,
        )
        tape.run_backward(operator)
        if split:
            whole = tape.gradient_tensor(sources[0])
            tape.run_backward(Operator("qkv.concatenate", OperatorKind.COPY, tuple(g.name for g in gradients), (whole,)))
            tape.give(sources[0], whole.name)
        else:
            for name, gradient in zip(sources, gradients, strict=True):
                tape.give(name, gradient.name)

    tape.node(node)
    return out


def _shape(part: Part) -> tuple[Polynomial, Polynomial, Polynomial, bool]:
    """Heads of all samples, queries and keys of each, and whether only a triangle of the scores is needed.

    A ring whose ranks hold an early and a late piece of each sequence gives all the same share of the triangle. With one piece each, the
    last rank needs all keys up to its own piece, a triangle of which it needs half: `S (1 - 1/(2 c))` keys for every query.
    """
    context, causal = part.form.context, part.spec.causal
    if context == 1:
        return B * part.heads, S, S, causal
    if part.form.context_style == "ulysses":
        return B * (part.heads // context), S, S, causal
    if part.form.context_style == "ring-contiguous" and causal:
        return B * part.heads, part.sequence, S * (1 - 1 / (2 * context)), False
    return B * part.heads, part.sequence, S, causal


def _workspace(part: Part, heads: Polynomial, queries: Polynomial) -> Polynomial:
    """What FlashAttention-2 allocates in its backward pass on CUDA, in fp32 elements.

    The gradient of the queries gathered in fp32 and one row sum per query; where several queries share a key also the gradients of keys
    and values for every query head, in 16 bit. The CPU kernel needs none of it. Source: Dao (2023), FlashAttention-2, and its
    implementation `flash_api.cpp` (`dq_accum`, `softmax_d`, `dk_expanded`), without their padding.
    """
    shared = part.tokens * part.query_width if part.kv_width != part.query_width else ZERO
    return part.tokens * (part.query_width + part.heads * part.spec.rotary_head) + heads * queries + shared
