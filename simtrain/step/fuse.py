"""Chains of elementwise operators that a framework runs as one kernel.

Megatron-LM compiles bias, dropout and the residual sum into one kernel, scales and masks inside the softmax, and rotates heads in one
kernel; tensors between such operators are never stored. An operator joins the one before it where it alone reads what that one writes.
Prices only: what lies in memory while a layer runs is the operators' own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

from simtrain.core.workload import Operator, OperatorKind
from simtrain.step.specialize import ConcreteLayer

_POINTWISE = (OperatorKind.ELEMENTWISE, OperatorKind.CAST)
_SOFTMAX = (OperatorKind.SOFTMAX, OperatorKind.SOFTMAX_BACKWARD)


def fused_operators(operators: tuple[Operator, ...], concrete: ConcreteLayer) -> tuple[Operator, ...]:
    """Returns operators with chains of pointwise ones as one each; a softmax takes in those before it, its gradient those behind it.

    The softmax is Megatron-LM's own, which keeps a row in registers, so that it moves each element once.

    Args:
        operators: Of a pass, in order.
        concrete: The layer that they are of.
    """
    readers = _readers(concrete)
    fused: list[Operator] = []
    for op in operators:
        before = next((b for b in reversed(fused) if _joins(b, op, readers)), None)
        if before is not None:
            fused.remove(before)
        fused.append(op if before is None else _merged(before, op))
    return tuple(replace(op, kind=OperatorKind.ELEMENTWISE, dims=()) if op.kind in _SOFTMAX else op for op in fused)


@lru_cache(maxsize=512)
def _readers(concrete: ConcreteLayer) -> Counter[str]:
    """How many operators really read each tensor; what is only kept alive does not count."""
    read = [name for op in concrete.forward + concrete.backward for name in {*op.reads, *op.updates} - set(op.partial)]
    return Counter(read)


def _joins(before: Operator, op: Operator, readers: Counter[str]) -> bool:
    if not before.writes or before.writes[0].name not in op.reads or readers[before.writes[0].name] != 1:
        return False
    if before.kind in _POINTWISE:
        return op.kind in _POINTWISE or op.kind is OperatorKind.SOFTMAX
    return before.kind is OperatorKind.SOFTMAX_BACKWARD and op.kind in _POINTWISE


def _merged(before: Operator, op: Operator) -> Operator:
    """One kernel for both: the tensor between them is not stored."""
    between = before.writes[0].name
    reads = tuple(dict.fromkeys((*before.reads, *(name for name in op.reads if name != between))))
    writes = (*op.writes, *before.writes[1:])
    return replace(op, kind=OperatorKind.ELEMENTWISE, reads=reads, writes=writes, partial=(*before.partial, *op.partial), dims=())


__all__ = ["fused_operators"]
