"""Products of one input that a framework makes as one: queries, keys and values; gate and up.

Where modules are separate, each has a product of its own in every pass and the gradients of their common input are added up; one matrix
for all of them (Megatron-LM's `linear_qkv` and `linear_fc1`) makes one product, whose sum is the product's own. Prices only: what lies in
memory while a layer runs is the operators' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from simtrain.core.polynomial import ZERO
from simtrain.core.workload import Dim, Operator, OperatorKind, Role

SUMMED = 3
"""Place of the dimension that a product is summed over."""


def joined_operators(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """Returns operators with products of the same `joins` as one each, where the last of them stood, and without sums between them."""
    groups: dict[str, list[Operator]] = {}
    for op in operators:
        if op.joins:
            groups.setdefault(op.joins, []).append(op)
    last = {group[-1].name: group for group in groups.values() if len(group) > 1}
    if not last:
        return tuple(operators)
    inside = {op.name for group in last.values() for op in group}
    partial = {op.writes[0].name for group in last.values() if _axis(group) == SUMMED for op in group}
    sums: dict[str, str] = {}  # the last sum of what parts of a product made: what the whole product writes
    kept: list[Operator] = []
    for op in operators:
        if op.kind is OperatorKind.ELEMENTWISE and len(op.reads) > 1 and partial.issuperset(op.reads):
            partial.add(op.writes[0].name)
            sums |= dict.fromkeys(op.reads, op.writes[0].name)
        elif op.name in last:
            kept.append(_joined(last[op.name]))
        elif op.name not in inside:
            kept.append(op)
    return tuple(replace(op, writes=tuple(replace(w, name=_end(w.name, sums)) for w in op.writes)) if op.joins else op for op in kept)


def _joined(parts: Sequence[Operator]) -> Operator:
    """One product for all of them: its result is as wide as theirs together, or its sum as long."""
    first, op, axis = parts[0], parts[-1], _axis(parts)
    size = sum((part.dims[axis].size for part in parts[1:]), first.dims[axis].size)
    dims = tuple(Dim(dim.role, size) if i == axis else dim for i, dim in enumerate(op.dims))
    written = op.writes if axis == SUMMED else tuple(w for part in parts for w in part.writes)
    reads = tuple(dict.fromkeys(name for part in parts for name in part.reads))
    held = tuple(name for name in reads if all(name in part.partial for part in parts if name in part.reads))
    flops = sum((part.flops for part in parts), ZERO)
    return replace(op, reads=reads, writes=written, partial=held, dims=dims, flops=flops)


def _axis(parts: Sequence[Operator]) -> int:
    """Which dimension grows: rows for gradients of weights, columns for products of one input, else the one that is summed over."""
    if parts[-1].dims[3].role is Role.TOKENS:
        return 1
    return 2 if parts[0].reads[0] == parts[-1].reads[0] else SUMMED


def _end(name: str, sums: dict[str, str]) -> str:
    while name in sums:
        name = sums[name]
    return name


__all__ = ["joined_operators"]
