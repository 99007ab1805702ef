"""What collectives inside a layer leave exposed beside the products that hide them.

* *In bulk*: a collective that the product beside it does not need (the gather of an input that only the weight's gradient will read,
  the reduction of an input's gradient beside the weight's product). Both run whole, side by side.
* *A gather in pieces*: each rank multiplies the piece that it has while the next one arrives, so that only what exceeds all products
  but the first piece's is waited for. Copy engines move the pieces, which takes no multiprocessors.
* *A scatter in pieces*: the product behind which it stands is cut into pieces, each of which is scattered beside the next one's product;
  the last piece's scatter is exposed. All pieces of the product leave the scatter's multiprocessors free, whether it runs or not.

Any other collective that takes a share s of the multiprocessors for c seconds beside a product lengthens it by s c. Sources: Megatron-LM,
core/tensor_parallel/layers.py (bulk); Transformer Engine, pytorch/module/base.py (which product overlaps which collective by which
method) and common/comm_gemm_overlap (pieces: one per rank of a ring exchange, which copy engines carry out; a number of splits otherwise).
Pieces of a product run on several streams there, so that they fill the device together: they are taken to be as fast as the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from simtrain.core.polynomial import FloatArray
from simtrain.core.runtime import Runtime
from simtrain.core.workload import Collective, Operator, OperatorKind, Role


def exposed_s(operators: Sequence[Operator], times_s: FloatArray, index: int, runtime: Runtime, ranks: int, *, block: bool) -> float:
    """Returns by how much a collective lengthens a pass.

    Args:
        operators: Of the pass, in order.
        times_s: What each takes alone.
        index: Of the collective.
        runtime: Which of them run beside products, and how.
        ranks: Of the collective's group.
        block: Whether the layer is a block of the model, whose modules are the library's that works in pieces; embedding and head are not.
    """
    op, alone_s = operators[index], float(times_s[index])
    taken_s = runtime.tensor.hidden_share * alone_s
    if op.overlaps:
        beside_s = sum(float(times_s[i]) for i in _independent(operators, index))
        return max(alone_s - beside_s, taken_s) if beside_s else alone_s
    if op.group != "tensor" or not block:
        return alone_s
    if op.collective is Collective.ALL_GATHER and runtime.tensor.split_gathers and op.writes:
        product_s = sum(float(times_s[i]) for i in _reading(operators, index))
        return max(alone_s - product_s * (1.0 - 1.0 / ranks), 0.0) if product_s else alone_s
    if op.collective is Collective.REDUCE_SCATTER and runtime.tensor.scatter_pieces > 1 and _follows_product(operators, index):
        last, product_s = 1.0 / runtime.tensor.scatter_pieces, float(times_s[index - 1])
        slowed_s = product_s / (1.0 - runtime.tensor.scatter_share)
        return max(slowed_s + alone_s * last, slowed_s * last + alone_s) - product_s
    return alone_s


def _sums_over_tokens(op: Operator) -> bool:
    """Whether it needs all tokens at once, as the gradient of a weight does."""
    return op.dims[3].role is Role.TOKENS


def _is_product(op: Operator) -> bool:
    return op.kind is OperatorKind.GEMM and len(op.dims) == 4


def _independent(operators: Sequence[Operator], index: int) -> list[int]:
    """Operators that a collective in bulk runs beside: the next one; in tensor parallelism the next product and the casts before it.

    What reads the collective's own result is left out.
    """
    behind = _until_next(operators, index)
    if operators[index].group != "tensor":
        return list(behind[:1])
    product = next((i for i in behind if _is_product(operators[i])), None)
    written = {w.name for w in operators[index].writes}
    return [] if product is None else [i for i in range(index + 1, product + 1) if written.isdisjoint(operators[i].reads[:1])]


def _until_next(operators: Sequence[Operator], index: int) -> range:
    """Operators behind a collective, before the next one."""
    ends = (i for i in range(index + 1, len(operators)) if operators[i].kind is OperatorKind.COLLECTIVE)
    return range(index + 1, next(ends, len(operators)))


def _reading(operators: Sequence[Operator], index: int) -> list[int]:
    """Products that can begin with a piece of what is gathered."""
    whole = operators[index].writes[0].name
    found = [i for i in _until_next(operators, index) if operators[i].reads[:1] == (whole,)]
    return [i for i in found if _is_product(operators[i]) and not _sums_over_tokens(operators[i])]


def _follows_product(operators: Sequence[Operator], index: int) -> bool:
    before = operators[index - 1] if index else None
    return before is not None and _is_product(before) and before.writes[0].name in operators[index].reads


__all__ = ["exposed_s"]
