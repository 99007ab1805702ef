"""A layer's backward pass in two parts, as zero-bubble schedules run it: what the layer before waits for, and the rest.

The parts follow from the list of operators: whatever the handed-on gradients depend on is in the input part, everything else only makes
gradients of parameters. An operator that makes both stays whole in the input part (norms, whose gradients of gain and bias come with that
of their input), except for convolutions: libraries run one kernel for the gradient of the input and another for that of the filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from simtrain.core.workload import Operator, OperatorKind
from simtrain.step.specialize import ConcreteLayer

HANDED_ON = ("dx", "shared:")
"""What other layers may wait for in the same micro-batch: names, and beginnings of names that end in a colon."""


@dataclass(frozen=True, slots=True)
class SplitBackward:
    """A backward pass in two parts, each in the order of the list it came from.

    Attributes:
        input_gradient: Operators that what is handed on depends on.
        weight_gradient: Operators that only the optimizer waits for.
        kept: Names of tensors that are alive between the parts: saved in forward, handed in (`x`, `dy`) or made by the first part, and
            read by the second. Parameters and the batch, which are held anyway, are not among them.
        made_between: Those of `kept` that the first part makes.
    """

    input_gradient: tuple[Operator, ...]
    weight_gradient: tuple[Operator, ...]
    kept: frozenset[str]
    made_between: frozenset[str]


def split_backward(concrete: ConcreteLayer, handed_on: Sequence[str] = HANDED_ON) -> SplitBackward:
    """Splits a layer's backward operators.

    The time of the input gradient of a convolution is that of the whole operator less that of its weight part: alone, one product of a
    convolution's backward pass reads as the gradient of the filter.

    Args:
        concrete: The layer.
        handed_on: What others wait for, as in `HANDED_ON`. Without `shared:`, the gradient of a tied weight is left to
            the weight part; the layer that adds it up must then run its own weight part later.
    """
    beginnings = tuple(name for name in handed_on if name.endswith(":"))
    operators = [part for op in concrete.backward for part in _products(op)]
    first: list[Operator] = []
    second: list[Operator] = []
    wanted = set(handed_on)
    overwritten: set[str] = set()
    for op in reversed(operators):
        made = {w.name for w in op.writes} | set(op.updates)
        read = set(op.reads) | set(op.updates)
        # what reads a tensor before the first part overwrites it cannot wait for the second
        if any(name in wanted or name.startswith(beginnings) for name in made) or read & overwritten:
            wanted |= read
            overwritten |= set(op.updates)
            first.append(op)
        else:
            second.append(op)
    own = {w.name for op in second for w in op.writes}
    held = {p.name for p in concrete.layer.parameters}
    kept = {name for op in second for name in (*op.reads, *op.updates) if name not in own | held and not name.startswith("input:")}
    made_between = kept & {w.name for op in first for w in op.writes}
    return SplitBackward(tuple(reversed(first)), tuple(reversed(second)), frozenset(kept), frozenset(made_between))


def _products(op: Operator) -> tuple[Operator, ...]:
    """The gradients of a convolution's input and of its filter (and bias) apart; other operators as they are."""
    to_weights = tuple(w for w in op.writes if w.name.startswith("grad:"))
    to_input = tuple(w for w in op.writes if not w.name.startswith("grad:"))
    if op.kind is not OperatorKind.CONVOLUTION_BACKWARD or not to_weights or not to_input:
        return (op,)
    one_product = 0.5 * op.flops
    return (
        replace(op, name=f"{op.name}.input", writes=to_input, flops=one_product, launches=1),
        replace(op, name=f"{op.name}.weight", writes=to_weights, flops=one_product, launches=op.launches - 1),
    )
