"""Gradient buckets of data parallelism: which gradients are reduced together, and after which layer's backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.core.precision import DType, Precision
from simtrain.core.runtime import Runtime
from simtrain.core.workload import Parameter, Workload


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that are reduced together.

    Attributes:
        size_bytes: Of all its gradients.
        gradients: Elements of each gradient in it.
        shapes: Of the same gradients.
        ready_after_layer: Position of the layer (repeats counted) whose backward pass completes it.
    """

    size_bytes: int
    gradients: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    ready_after_layer: int


def gradient_bytes(precision: Precision, runtime: Runtime) -> int:
    """Bytes of one gradient as it is added up and reduced.

    A framework with a gradient buffer keeps it in fp32, except for fp16 weights, whose gradients stay in fp16 (Megatron-LM forces fp32
    accumulation for bf16 alone: `training/arguments.py`, `accumulate_allreduce_grads_in_fp32`).
    """
    return 4 if runtime.update.main_gradients and precision.parameter is not DType.FP16 else precision.parameter.size_bytes


def reduced_bytes(precision: Precision, runtime: Runtime) -> int:
    """Bytes of one gradient while it is reduced."""
    return max(gradient_bytes(precision, runtime), 4 if runtime.replicas.wide_reduction else 0)


def gradient_buckets(workload: Workload, precision: Precision, runtime: Runtime, *, expert: bool = False) -> tuple[Bucket, ...]:
    """Fills buckets in the order in which gradients become ready, as DistributedDataParallel does after its first step.

    A bucket is closed once it has reached its limit; the first one is small, so that communication starts early. A tied weight is
    complete only when the layer that owns it has run.

    Args:
        workload: The layers that a rank holds.
        precision: Format of the gradients.
        runtime: Sizes of buckets.
        expert: Take the gradients of experts, which other ranks reduce; those of everything else by default.

    Source: PyTorch, `torch/csrc/distributed/c10d/reducer.cpp` (`compute_bucket_assignment_by_size`, `rebuildBuckets`).
    """
    size = reduced_bytes(precision, runtime)
    buckets: list[Bucket] = []
    gradients: list[Parameter] = []
    filled = 0
    limit, last = runtime.replicas.first_bucket_bytes, -1
    position = workload.depth
    for layer in reversed(workload.layers):
        for _ in range(layer.repeats):
            position -= 1
            for parameter in reversed(layer.trained):
                if parameter.expert is not expert:
                    continue
                gradients.append(parameter)
                filled += parameter.elements * size
                last = position
                if filled >= limit:
                    buckets.append(_bucket(gradients, filled, last))
                    gradients, filled, limit = [], 0, runtime.replicas.bucket_bytes
    if gradients:
        buckets.append(_bucket(gradients, filled, last))
    return tuple(buckets)


def _bucket(parameters: list[Parameter], size_bytes: int, last: int) -> Bucket:
    return Bucket(size_bytes, tuple(p.elements for p in parameters), tuple(p.shape for p in parameters), last)
