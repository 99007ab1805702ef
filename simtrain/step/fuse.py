"""Chains of elementwise operators that a framework runs as one kernel.

Megatron-LM compiles bias, dropout and the residual sum into one kernel, scales and masks inside the softmax, and rotates heads in one
kernel; tensors between such operators are never stored. An operator joins the one before it where it alone reads what that one writes.
torch.compile also puts norms into such chains, and leaves out the reading alone where others read what is between.
Prices only: what lies in memory while a layer runs is the operators' own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

from simtrain.core.workload import Operator, OperatorKind
from simtrain.step.specialize import NORMS, ConcreteLayer

_POINTWISE = (OperatorKind.ELEMENTWISE, OperatorKind.CAST)
_SOFTMAX = (OperatorKind.SOFTMAX, OperatorKind.SOFTMAX_BACKWARD)


def fused_operators(operators: tuple[Operator, ...], concrete: ConcreteLayer, *, norms: bool = False) -> tuple[Operator, ...]:
    """Returns operators with chains of pointwise ones as one each; a softmax takes in those before it, its gradient those behind it.

    The softmax is Megatron-LM's own, which keeps a row in registers, so that it moves each element once.

    Args:
        operators: Of a pass, in order.
        concrete: The layer that they are of.
        norms: Whether norms join what stands before and behind them, and run at the bandwidth as elementwise kernels do; gradients of a
            norm's weights are a kernel of their own, which reads what the norm's backward reads.
    """
    readers = _readers(concrete)
    fused: list[Operator] = []
    for op in _without_weights(operators) if norms else operators:
        before = next((b for b in reversed(fused) if _joins(b, op, readers, norms=norms)), None)
        if before is not None:
            fused.remove(before)
        fused.append(op if before is None else _merged(before, op, stored=readers[before.writes[0].name] > 1))
    return tuple(replace(op, kind=OperatorKind.ELEMENTWISE, dims=()) if op.kind in _SOFTMAX else op for op in fused)


@lru_cache(maxsize=512)
def _readers(concrete: ConcreteLayer) -> Counter[str]:
    """How many operators really read each tensor; what is only kept alive does not count, what other layers read counts."""
    read = [name for op in concrete.forward + concrete.backward for name in {*op.reads, *op.updates} - set(op.partial)]
    return Counter((*read, "y", "dx"))


def _joins(before: Operator, op: Operator, readers: Counter[str], *, norms: bool) -> bool:
    if not before.writes or before.writes[0].name not in op.reads:
        return False
    if norms and {before.kind, op.kind} <= {*_POINTWISE, *NORMS} and not {before.kind, op.kind} <= {*NORMS}:
        return True
    if readers[before.writes[0].name] != 1:
        return False
    if before.kind in _POINTWISE:
        return op.kind in _POINTWISE or op.kind is OperatorKind.SOFTMAX
    return before.kind is OperatorKind.SOFTMAX_BACKWARD and op.kind in _POINTWISE


def _merged(before: Operator, op: Operator, *, stored: bool) -> Operator:
    """One kernel for both: the tensor between them is not read again, nor stored unless others read it."""
    between = before.writes[0].name
    reads = tuple(dict.fromkeys((*before.reads, *(name for name in op.reads if name != between))))
    writes = (*op.writes, *before.writes[0 if stored else 1 :])
    return replace(op, kind=OperatorKind.ELEMENTWISE, reads=reads, writes=writes, partial=(*before.partial, *op.partial), dims=())


def _without_weights(operators: tuple[Operator, ...]) -> tuple[Operator, ...]:
    """Splits what a norm's backward pass writes: the gradient of its input, and those of its weights."""
    split: list[Operator] = []
    for op in operators:
        if op.kind is OperatorKind.NORM_BACKWARD and len(op.writes) > 1:
            weights = replace(op, name=f"{op.name}.weights", kind=OperatorKind.REDUCTION, writes=op.writes[1:], dims=())
            split += [weights, replace(op, writes=op.writes[:1])]
        else:
            split.append(op)
    return tuple(split)


__all__ = ["fused_operators"]
