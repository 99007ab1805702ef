"""What optimizers keep and do beyond elementwise fp32 states: 8-bit states in blocks, orthogonalized updates of whole matrices.

AdamW with 8-bit states (`adamw-8bit`) is bitsandbytes': two bytes per parameter and an fp32 scale per block and state; tensors below 4096
elements keep fp32 states. Read in bitsandbytes/optim/optimizer.py (`min_8bit_size`, `absmax1`); that version has blocks of 2048, recent
ones of 256 (recalled, not looked up).

Muon is PyTorch's (`torch/optim/_muon.py` of 2.13, read): one momentum buffer for each matrix inside a block, whose update runs through
five Newton-Schulz steps of three bf16 products each; AdamW updates embeddings, the head, vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING

import numpy as np

from simtrain.core.errors import UnsupportedError
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.precision import DType, Precision
from simtrain.core.strategy import OPTIMIZERS, Strategy
from simtrain.core.workload import OperatorKind, Parameter, Workload
from simtrain.step.kernels import elementwise_kernels, optimizer_kernels

if TYPE_CHECKING:
    from simtrain.step.layout import Lane
    from simtrain.step.setting import Setting

STEP_COUNTER_BYTES = 4
"""AdamW keeps a step counter tensor per parameter (`torch/optim/adamw.py`)."""

NEWTON_SCHULZ_STEPS = 5
SMALLEST_8BIT = 4096
"""Elements below which bitsandbytes keeps fp32 states."""
STATE_BLOCK = 256
"""Elements of an 8-bit state that share a scale."""


def orthogonalized(optimizer: str, parameter: Parameter, *, block: bool) -> bool:
    """Whether Muon updates a parameter: a matrix inside a block."""
    return optimizer == "muon" and block and len(parameter.shape) == 2


def state_tensors(optimizer: str, parameter: Parameter, precision: Precision, *, block: bool) -> list[tuple[float, float]]:
    """Elements and bytes of each of what an optimizer keeps of a parameter, masters and compensations included.

    Args:
        optimizer: A name of `OPTIMIZERS`.
        parameter: Of which.
        precision: Formats of states and masters.
        block: Whether it belongs to a block.
    """
    count, wide = float(parameter.elements), float(precision.state.size_bytes)
    kept = [(count, wide)] * (precision.master is not None) + [(count, float(precision.parameter.size_bytes))] * precision.compensated
    if optimizer == "adamw-8bit" and parameter.elements >= SMALLEST_8BIT:
        return kept + [(count, 1.0), (float(-(-parameter.elements // STATE_BLOCK)), 4.0)] * 2
    if optimizer == "adamw-8bit":
        return kept + [(count, 4.0)] * 2
    if orthogonalized(optimizer, parameter, block=block):
        return [*kept, (count, wide)]
    counter = [(1.0, float(STEP_COUNTER_BYTES))] if optimizer in ("adamw", "adam", "muon") else []
    return kept + [(count, wide)] * OPTIMIZERS[optimizer] + counter


def lane_parameters(lane: Lane) -> list[tuple[Parameter, bool]]:
    """Parameters that a lane owns, repeats counted, each with whether it belongs to a block."""
    return [(p, x.block) for chunk in lane.chunks for x in chunk.workload for p in x.parameters if p.tied_to is None]


def lays_gradients_flat(setting: Setting) -> bool:
    """Whether fp16 gradients take passes of their own around the update (`Update.flat_gradients`): where no ZeRO optimizer stands in."""
    recipe = setting.precision
    return setting.runtime.update.flat_gradients and setting.strategy.zero == 0 and recipe.loss_scaling and recipe.master is not None


def update_kernels(setting: Setting, parameters: Sequence[tuple[Parameter, bool]], shards: tuple[int, int]) -> list[KernelBatch]:
    """Kernels of one update of a rank.

    Args:
        setting: The question.
        parameters: Trained ones, each with whether it belongs to a block.
        shards: Ranks that share the update of everything but experts, and of experts.
    """
    over, over_experts = shards
    optimizer, precision, runtime = setting.strategy.optimizer, setting.precision, setting.runtime
    matrices = [p.shape for p, block in parameters if orthogonalized(optimizer, p, block=block)]
    # experts are divided among fewer ranks, so that each updates more of them
    rest = [
        p.elements * (over // over_experts if p.expert else 1) for p, block in parameters if not orthogonalized(optimizer, p, block=block)
    ]
    if optimizer == "adamw-8bit":
        return [_eight_bit_kernels(rest, precision, over)]
    if optimizer == "muon":
        return [optimizer_kernels(rest, "adamw", precision, runtime, over), *muon_kernels(_fullest(matrices, over), precision)]
    return [optimizer_kernels(rest, optimizer, precision, runtime, over, flat=lays_gradients_flat(setting))]


def _eight_bit_kernels(sizes: Sequence[int], precision: Precision, over: int) -> KernelBatch:
    """One kernel per tensor reads weight, gradient and states and writes all but the gradient; scales of blocks come and go too."""
    moved = []
    for size in sizes:
        states = 2 * (1 + 4 / STATE_BLOCK) if size >= SMALLEST_8BIT else 8
        moved.append(size * (3 * precision.state.size_bytes + 2 * states) / over)
    return elementwise_kernels("adamw-8bit", OperatorKind.OPTIMIZER, moved, [1] * len(moved), precision.parameter)


def _fullest(shapes: Sequence[tuple[int, ...]], ranks: int) -> list[tuple[int, ...]]:
    """Matrices of the rank that has most to do, where each matrix goes to whoever has least, the largest first."""
    if ranks == 1:
        return list(shapes)
    loads: list[tuple[float, int, list[tuple[int, ...]]]] = [(0.0, i, []) for i in range(ranks)]
    heapify(loads)
    for shape in sorted(shapes, key=newton_schulz_flops, reverse=True):
        load, i, own = loads[0]
        heapreplace(loads, (load + newton_schulz_flops(shape), i, [*own, shape]))
    return max(loads)[2]


def newton_schulz_flops(shape: Sequence[int]) -> float:
    """FLOPs that orthogonalize a matrix: five times X X^T, its square, and that times X, over the shorter side."""
    short, long = min(shape), max(shape)
    return NEWTON_SCHULZ_STEPS * (4.0 * short * short * long + 2.0 * short**3)


def muon_kernels(shapes: Sequence[tuple[int, ...]], precision: Precision) -> list[KernelBatch]:
    """Kernels that update matrices: products in bf16, and the elementwise passes around them.

    Momentum and its look-ahead read two tensors and write one each, then come the conversion to bf16, its norm and the division by it;
    in the end the weight decays and takes the update.
    """
    if not shapes:
        return []
    wide = precision.state.size_bytes
    passes = (3 * wide, 3 * wide, wide + 2, 2, 4, 2 * wide, 2 * wide + 2)
    moved = [float(sum(passes)) * a * b for a, b in shapes]
    around = elementwise_kernels("muon", OperatorKind.OPTIMIZER, moved, [len(passes)] * len(moved), precision.state)
    rows = [row for shape in shapes for row in _products(min(shape), max(shape))]
    m, n, k, extra = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    count = len(rows)
    products = KernelBatch(
        names=("newton-schulz",) * count,
        kinds=(OperatorKind.GEMM,) * count,
        batch=np.ones(count),
        m=m,
        n=n,
        k=k,
        flops=2 * m * n * k,
        bytes_moved=2 * (m * k + k * n + m * n + extra),
        element_bytes=np.full(count, 2.0),
        launches=np.ones(count, dtype=np.int64),
        causal=np.zeros(count, dtype=bool),
        arithmetic=DType.BF16,
    )
    return [around, products]


def _products(short: int, long: int) -> list[tuple[int, int, int, int]]:
    """Rows, columns, contraction and further elements read of the products of all steps."""
    gram, square, turned = (short, short, long, 0), (short, short, short, short * short), (short, long, short, short * long)
    return [gram, square, turned] * NEWTON_SCHULZ_STEPS


def muon_transient_bytes(shapes: Sequence[tuple[int, ...]], precision: Precision) -> float:
    """Most that the update of one matrix holds: the look-ahead, X before and after a step, two matrices over the shorter side."""
    return max(((precision.state.size_bytes + 4.0) * a * b + 4.0 * min(a, b) ** 2 for a, b in shapes), default=0.0)


def refuse_optimizer(workload: Workload, strategy: Strategy, devices: Sequence[Device]) -> None:
    """Refuses what an optimizer cannot do or is not modelled for.

    Raises:
        UnsupportedError: Matrices that no rank has whole, or kernels for GPUs alone.
    """
    if strategy.optimizer == "adamw-8bit" and any(d.device_class != "gpu" for d in devices):
        other = next(d for d in devices if d.device_class != "gpu")
        raise UnsupportedError(
            f"optimizer=adamw-8bit is bitsandbytes' for GPUs, and {other.name} is of class {other.device_class}: use adamw"
        )
    if strategy.moved.optimizer and strategy.optimizer in ("muon", "adamw-8bit"):
        raise UnsupportedError(f"optimizer={strategy.optimizer} with offload={strategy.offload} is not modelled on the host: use adamw")
    if strategy.optimizer != "muon":
        return
    divided = [f"{n}={v}" for n, v, most in (("tensor", strategy.tensor, 1), ("zero", strategy.zero, 1)) if v > most]
    if divided:
        raise UnsupportedError(
            f"optimizer=muon orthogonalizes whole matrices, which {' and '.join(divided)} divides: gathering them is not modelled; "
            "use tensor=1 and zero=0 or 1 (whole matrices dealt out to ranks)"
        )
    if any(p.expert for layer in workload.layers for p in layer.parameters):
        raise UnsupportedError(f"optimizer=muon is not modelled for experts ({workload.name}): use adamw")
