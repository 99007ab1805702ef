"""Number formats and the precision recipes that assign one to each role of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from simtrain.core.errors import UnknownNameError


class DType(StrEnum):
    """A number format or, for `TF32`, an arithmetic path with its own peak rate."""

    FP64 = "fp64"
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT64 = "int64"
    BOOL = "bool"

    @property
    def size_bytes(self) -> int:
        """Bytes that one stored element takes (TF32 is stored as fp32)."""
        return _SIZES[self]


_SIZES = {DType.FP64: 8, DType.FP32: 4, DType.TF32: 4, DType.BF16: 2, DType.FP16: 2, DType.FP8: 1, DType.INT64: 8, DType.BOOL: 1}


class DTypeRole(StrEnum):
    """What a tensor is for, where it decides the number format.

    Attributes:
        LOW: Operands and results of matrix products (16-bit under autocast).
        HIGH: The residual stream, norms and losses (fp32 under autocast).
        PARAMETER: Weights as stored.
        GRADIENT: Parameter gradients as stored.
        FP32: Always fp32 (statistics of norms, log-sum-exp).
        INDEX: Token ids (int64).
        MASK: Dropout masks (one byte on GPUs).
    """

    LOW = "low"
    HIGH = "high"
    PARAMETER = "parameter"
    GRADIENT = "gradient"
    FP32 = "fp32"
    INDEX = "index"
    MASK = "mask"


@dataclass(frozen=True, slots=True)
class Precision:
    """Which number format each role has.

    Attributes:
        name: How people write it.
        low: Storage of matrix-product operands.
        high: Storage of the residual stream, norms and losses.
        parameter: Storage of the weights (and, without masters, what the optimizer updates).
        arithmetic: Path that matrix products run on; its peak is the denominator of MFU.
        master: Format of the copy that the optimizer updates, where the weights themselves are too coarse for it.
        loss_scaling: Whether a dynamic loss scaler runs (it makes the host wait for the device once a step).
    """

    name: str
    low: DType
    high: DType
    parameter: DType
    arithmetic: DType
    master: DType | None = None
    loss_scaling: bool = False

    def dtype(self, role: DTypeRole) -> DType:
        """Returns the number format of a role."""
        fixed = {DTypeRole.FP32: DType.FP32, DTypeRole.INDEX: DType.INT64, DTypeRole.MASK: DType.BOOL}
        if role in fixed:
            return fixed[role]
        return {DTypeRole.LOW: self.low, DTypeRole.HIGH: self.high}.get(role, self.parameter)

    @property
    def state(self) -> DType:
        """Format of the optimizer's state."""
        return self.master or self.parameter

    @property
    def autocast(self) -> bool:
        """Whether matrix products run on casts of the stored weights."""
        return self.low is not self.parameter


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", DType.FP32, DType.FP32, DType.FP32, DType.FP32),
        Precision("tf32", DType.FP32, DType.FP32, DType.FP32, DType.TF32),
        Precision("fp16-amp", DType.FP16, DType.FP32, DType.FP32, DType.FP16, loss_scaling=True),
        Precision("fp16-master", DType.FP16, DType.FP16, DType.FP16, DType.FP16, master=DType.FP32, loss_scaling=True),
        Precision("bf16-amp", DType.BF16, DType.FP32, DType.FP32, DType.BF16),
        Precision("bf16", DType.BF16, DType.BF16, DType.BF16, DType.BF16),
        Precision("bf16-master", DType.BF16, DType.BF16, DType.BF16, DType.BF16, master=DType.FP32),
    )
}
"""Recipes by name: `fp32`, `tf32` (fp32 storage), `fp16-amp`/`bf16-amp` (autocast over fp32 weights), `bf16` (everything), and
`fp16-master`/`bf16-master` (everything in 16 bit, the optimizer on an fp32 copy: what NVIDIA's Apex calls O2, and Megatron-LM's way)."""


def precision(name: str) -> Precision:
    """Looks a recipe up.

    Raises:
        UnknownNameError: With the nearest names.
    """
    try:
        return PRECISIONS[name]
    except KeyError:
        raise UnknownNameError("precision", name, PRECISIONS) from None
