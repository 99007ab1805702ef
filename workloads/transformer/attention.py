"""Attention as operators: projections, rotation of queries and keys, and the fused attention product.

FLOPs follow `torch.utils.flop_counter`: two matrix products forward; five backward for the fused kernel, because it computes the scores
anew. The unfused form (`unfused`) keeps the probabilities and needs four.
"""

from __future__ import annotations

from dataclasses import replace

from simtrain.core.polynomial import ZERO, B, Polynomial, S, as_polynomial
from simtrain.core.workload import Dim, Operator, OperatorKind, Role, Tensor
from workloads.common.pieces import FP32, LOW, Axis, linear
from workloads.common.tape import Tape
from workloads.transformer.spec import TransformerSpec
from workloads.transformer.unfused import Operand, unfused_product

TOKENS = B * S


def attention(tape: Tape, x: str, out: str, spec: TransformerSpec) -> str:
    """Self-attention with its projections.

    One matrix for queries, keys and values is split by views, so that its gradient is one concatenation of three.
    """
    hidden = Axis(Role.HIDDEN, spec.hidden)
    widths = (spec.query_width, spec.kv_width, spec.kv_width)
    if spec.fused_qkv:
        linear(tape, x, "attention.qkv", "qkv", tokens=TOKENS, inner=hidden, outer=Axis(Role.HEADS, sum(widths)), bias=spec.bias)
        q = k = v = "qkv"
    else:
        q, k, v = (
            linear(tape, x, f"attention.{n}", n, tokens=TOKENS, inner=hidden, outer=Axis(Role.HEADS, width), bias=spec.bias)
            for n, width in zip("qkv", widths, strict=True)
        )
    if spec.positions == "rotary":
        q, k = rotate(tape, q, spec), rotate(tape, k, spec)
    product(tape, (q, k, v), "attended", spec)
    inner = Axis(Role.HEADS, spec.query_width)
    return linear(tape, "attended", "attention.proj", out, tokens=TOKENS, inner=inner, outer=hidden, bias=spec.bias, holds=(x, q, k, v))


def rotate(tape: Tape, x: str, spec: TransformerSpec) -> str:
    """Rotary position embedding: pairs of neighbours as complex numbers (in fp32) times a table of rotations."""
    high = tape.cast(x, FP32)
    turned = Tensor(f"{x}.turned", tape.tensors[x].elements, FP32)
    tape.run(Operator(f"{x}.rotate", OperatorKind.ELEMENTWISE, (high,), (turned,)))

    def node() -> None:
        dx, back = tape.gradient_tensor(high), Tensor(f"{x}.rotation_back", S * spec.size_of_head, FP32)
        tape.run_backward(
            Operator(f"{x}.rotation_back", OperatorKind.ELEMENTWISE, (), (back,)),
            Operator(f"{x}.rotate.backward", OperatorKind.ELEMENTWISE, (tape.gradient(turned.name), back.name), (dx,)),
        )
        tape.give(high, dx.name)

    tape.node(node)
    return tape.cast(turned.name, LOW, holds=(x, high))


def product(tape: Tape, sources: tuple[str, str, str], out: str, spec: TransformerSpec) -> str:
    """`softmax(Q K^T / sqrt(d)) V` as one kernel that keeps only the log-sum-exp of every row of scores."""
    width, kv_width, head = spec.query_width, spec.kv_width, as_polynomial(spec.size_of_head)
    split = len(set(sources)) == 1
    gradients = (
        (Tensor("dq", TOKENS * width), Tensor("dk", TOKENS * kv_width), Tensor("dv", TOKENS * kv_width))
        if split
        else tuple(tape.gradient_tensor(n) for n in sources)
    )
    operands = {n: Operand(s, g.name, g.elements) for n, s, g in zip("qkv", sources, gradients, strict=True)}
    forward, backward = unfused_product(spec, operands, out, f"d{out}")
    dims = (Dim(Role.HEADS, B * spec.heads), Dim(Role.SEQUENCE, S), Dim(Role.SEQUENCE, S), Dim(Role.HEAD_DIM, head))
    matrix_product: Polynomial = 2 * (B * spec.heads * S * S * head)
    written = (Tensor(out, TOKENS * width, LOW), Tensor(f"{out}.log_sum_exp", B * spec.heads * S, FP32))
    reads = tuple(dict.fromkeys(sources))
    operator = Operator("attention", OperatorKind.ATTENTION, reads, written, dims=dims, flops=2 * matrix_product, causal=spec.causal)
    tape.run(replace(operator, unfused=forward))

    def node() -> None:
        operator = Operator(
            "attention.backward",
            OperatorKind.ATTENTION_BACKWARD,
            (tape.gradient(out), *reads, out, f"{out}.log_sum_exp"),
            gradients,
            dims=dims,
            flops=5 * matrix_product,
            causal=spec.causal,
            launches=3,
            workspace=_workspace(spec),
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


def _workspace(spec: TransformerSpec) -> Polynomial:
    """What FlashAttention-2 allocates in its backward pass on CUDA, in fp32 elements.

    The gradient of the queries gathered in fp32 and one row sum per query; where several queries share a key also the gradients of keys
    and values for every query head, in 16 bit. The CPU kernel needs none of it. Source: Dao (2023), FlashAttention-2, and its
    implementation `flash_api.cpp` (`dq_accum`, `softmax_d`, `dk_expanded`), without their padding.
    """
    shared = TOKENS * spec.query_width if spec.kv_width != spec.query_width else ZERO
    return TOKENS * spec.query_width + B * spec.heads * S + shared
