"""Kernels as a workload would state them."""

import numpy as np

from simtrain.core.kernels import KernelBatch
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind

_TENSORS = {"attention": (4, 4), "attention_backward": (10, 8)}
"""FLOPs per score and head element, and tensors of queries' size, of fused attention."""


def build(kind, shapes, arithmetic=DType.FP32, *, causal=False, launches=1):
    """Kernels of one kind; a shape is `(batch, m, n, k)`, bytes are all tensors once."""
    kind = OperatorKind(kind)
    element_bytes = arithmetic.size_bytes
    b, m, n, k = np.array(shapes, dtype=np.float64).T
    if kind in (OperatorKind.GEMM, OperatorKind.BATCHED_GEMM):
        flops, moved = 2 * b * m * n * k, b * (m * k + k * n + m * n) * element_bytes
    elif kind.value in _TENSORS:
        per_score, tensors = _TENSORS[kind.value]
        flops, moved = per_score * b * m * n * k, tensors * b * m * k * element_bytes
    else:
        flops, moved = np.zeros_like(b), (3 if kind.value.endswith("backward") else 2) * b * m * k * element_bytes
    count = len(shapes)
    return KernelBatch(
        names=tuple(f"{kind}{i}" for i in range(count)),
        kinds=(kind,) * count,
        batch=b,
        m=m,
        n=n,
        k=k,
        flops=flops,
        bytes_moved=moved,
        element_bytes=np.full(count, float(element_bytes)),
        launches=np.full(count, launches, dtype=np.int64),
        causal=np.full(count, causal),
        arithmetic=arithmetic,
    )
