"""What replaces captured fused attention where a runtime has no such kernel: scores, scale, mask, softmax and context one by one.

Copies that rearrange heads in memory are left out; they depend on how a model lays its projections out, which a fused kernel hides.
"""

from __future__ import annotations

from dataclasses import replace

from simtrain.core.polynomial import ONE, Polynomial
from simtrain.core.precision import DTypeRole
from simtrain.core.workload import Dim, Operator, OperatorKind, Role, Tensor, gemm_flops

Pair = tuple[Operator, ...]


def with_unfused(forward: Pair, backward: Pair) -> tuple[Pair, Pair]:
    """Returns the lists of a layer with the replacement of every fused attention added."""
    fused = {op.writes[1].name: op for op in forward if op.kind is OperatorKind.ATTENTION and len(op.writes) > 1}
    back = {name: op for op in backward if op.kind is OperatorKind.ATTENTION_BACKWARD for name in op.reads if name in fused}
    if len(back) < len(fused) or any(op.kind is OperatorKind.ATTENTION for op in backward):
        return forward, backward  # recomputed by the model itself
    made = {fused[name].name: _forward(fused[name]) for name in fused}
    undone = {op.name: _backward(op, fused[name]) for name, op in back.items()}
    return (
        tuple(replace(op, unfused=made[op.name]) if op.name in made else op for op in forward),
        tuple(replace(op, unfused=undone[op.name]) if op.name in undone else op for op in backward),
    )


def _sources(op: Operator) -> tuple[str, ...]:
    return tuple(r for r in op.reads if r not in op.partial)


def _product(name: str, reads: tuple[str, ...], written: Tensor, dims: tuple[Dim, Dim, Dim, Dim]) -> Operator:
    heads, m, n, k = dims
    flops = gemm_flops(heads.size, m.size, n.size, k.size)
    return Operator(name, OperatorKind.BATCHED_GEMM, reads, (written,), dims=dims, flops=flops)


def _steps(name: str, start: str, kinds: list[tuple[str, OperatorKind, DTypeRole]], size: Polynomial) -> list[Operator]:
    """A chain of operators over the score matrix, each reading the one before."""
    steps = []
    for suffix, kind, role in kinds:
        written = Tensor(f"{name}.{suffix}", size, role)
        steps.append(Operator(written.name, kind, (start,), (written,)))
        start = written.name
    return steps


def _forward(op: Operator) -> Pair:
    heads, m, n, head = op.dims
    size, name = heads.size * m.size * n.size, op.name
    scores = Tensor(f"{name}.scores", size)
    chain = [("scaled", OperatorKind.ELEMENTWISE, DTypeRole.LOW)]
    chain += [("masked", OperatorKind.ELEMENTWISE, DTypeRole.LOW)] if op.causal else []
    chain += [("high", OperatorKind.CAST, DTypeRole.HIGH), ("weights", OperatorKind.SOFTMAX, DTypeRole.HIGH)]
    chain += [("low", OperatorKind.CAST, DTypeRole.LOW)]
    steps = [_with_rows(s, heads.size * m.size, n) for s in _steps(name, scores.name, chain, size)]
    context = _product(f"{name}.context", (f"{name}.low", *_sources(op)), op.writes[0], (heads, m, head, n))
    return _product(scores.name, _sources(op), scores, (heads, m, n, head)), *steps, context


def _backward(op: Operator, forward: Operator) -> Pair:
    heads, m, n, head = op.dims
    size, name, before = heads.size * m.size * n.size, op.name, forward.name
    gradient, sources = op.reads[0], _sources(forward)
    dq, dk, dv = op.writes
    dlow = Tensor(f"{name}.dlow", size)
    to_values = _product(f"{name}.dv", (f"{before}.low", gradient), dv, (heads, n, head, m))
    to_weights = _product(dlow.name, (gradient, *sources), dlow, (heads, m, n, head))
    chain = [("dweights", OperatorKind.CAST, DTypeRole.HIGH), ("dhigh", OperatorKind.SOFTMAX_BACKWARD, DTypeRole.HIGH)]
    chain += [("dmasked", OperatorKind.CAST, DTypeRole.LOW)]
    chain += [("dscaled", OperatorKind.ELEMENTWISE, DTypeRole.LOW)] if op.causal else []
    chain += [("dscores", OperatorKind.ELEMENTWISE, DTypeRole.LOW)]
    steps = [_with_rows(s, heads.size * m.size, n) for s in _steps(name, dlow.name, chain, size)]
    steps = [replace(s, reads=(*s.reads, f"{before}.weights")) if s.kind is OperatorKind.SOFTMAX_BACKWARD else s for s in steps]
    last = f"{name}.dscores"
    to_queries = _product(f"{name}.dq", (last, *sources), dq, (heads, m, head, n))
    to_keys = _product(f"{name}.dk", (last, *sources), dk, (heads, n, head, m))
    return to_values, to_weights, *steps, to_queries, to_keys


def _with_rows(op: Operator, rows: Polynomial, width: Dim) -> Operator:
    if op.kind not in (OperatorKind.SOFTMAX, OperatorKind.SOFTMAX_BACKWARD):
        return op
    one = Dim(Role.BATCH, ONE)
    return replace(op, dims=(one, Dim(Role.HEADS, rows), one, width))
