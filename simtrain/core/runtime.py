"""What carries a strategy out: the behaviour of the framework that changes time or memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from simtrain.core.errors import UnknownNameError

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Runtime:
    """A framework's behaviour. Never a hidden bit per measured row: a preset or an explicit `with_`.

    Attributes:
        name: As in `RUNTIMES`.
        launch_s: Host time to issue one kernel in forward or backward (assumption; hosts differ by 2x).
        run_ahead_launches: How far the host may be ahead of the device; 0 means the host computes itself (CPU).
        fused_attention: Whether attention is one kernel that does not store the score matrix.
        optimizer_style: "foreach" (multi-tensor with parameter-sized temporaries), "fused" (one pass) or "single" (tensor by tensor).
        first_bucket_bytes: Size of the first gradient bucket.
        bucket_bytes: Size of the others.
        gradient_as_bucket_view: Whether gradients live inside the buckets (else buckets are a second copy).
        overlap_communication: Whether buckets are reduced while backward goes on.
        allocator: "caching" (512-byte blocks, reserved segments) or "exact" (what is asked for).
        context_bytes: Device memory outside the allocator (driver context, libraries).
        reserved_factor: Reserved over allocated bytes (0 where the allocator has no such thing).
        workspace_bytes: Persistent library workspaces on the device.
        sources: What these constants rest on.
    """

    name: str
    launch_s: float
    run_ahead_launches: int
    fused_attention: bool
    optimizer_style: Literal["foreach", "fused", "single"]
    first_bucket_bytes: int = 1 * MIB
    bucket_bytes: int = 25 * MIB
    gradient_as_bucket_view: bool = False
    overlap_communication: bool = True
    allocator: Literal["caching", "exact"] = "caching"
    context_bytes: int = 0
    reserved_factor: float = 1.0
    workspace_bytes: int = 0
    sources: tuple[str, ...] = ()

    def with_(self, **changes: object) -> Runtime:
        """Returns a copy with some behaviour changed, such as `with_(fused_attention=False)`."""
        return replace(self, **changes)  # type: ignore[arg-type]


RUNTIMES: dict[str, Runtime] = {
    r.name: r
    for r in (
        Runtime(
            name="torch-eager",
            launch_s=6e-6,
            run_ahead_launches=1000,
            fused_attention=True,
            optimizer_style="foreach",
            context_bytes=450 * MIB,
            reserved_factor=1.05,
            workspace_bytes=2 * 8_519_680,
            sources=(
                "PyTorch 2.13 documentation: DistributedDataParallel (bucket sizes), optim (foreach default on CUDA), CUDA semantics",
                "assumption: 6 us of host time per launched kernel in eager PyTorch, 450 MiB of driver context, reserved 1.05 x allocated",
            ),
        ),
        Runtime(
            name="torch-eager-cpu",
            launch_s=0.0,
            run_ahead_launches=0,
            fused_attention=True,
            optimizer_style="single",
            allocator="exact",
            sources=("PyTorch 2.13 on the CPU: the host computes, its cost per operator is part of the calibrated kernel times",),
        ),
    )
}
"""Presets by name."""


def runtime(name: str) -> Runtime:
    """Looks a preset up.

    Raises:
        UnknownNameError: With the nearest names.
    """
    try:
        return RUNTIMES[name]
    except KeyError:
        raise UnknownNameError("runtime", name, RUNTIMES) from None
