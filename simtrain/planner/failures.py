"""Combinations that do not work, and why."""

from __future__ import annotations

from simtrain.core.result import MemoryReport
from simtrain.core.runtime import Runtime
from simtrain.core.units import format_bytes
from simtrain.planner.found import Failure
from simtrain.planner.objectives import Limits
from simtrain.planner.space import Candidate

CHOICES = (
    *("micro_batch", "precision", "checkpoint", "zero", "tensor", "sequence_parallel"),
    *("pipeline", "schedule", "chunks", "context", "expert", "shard"),
)


def difference(a: Candidate, b: Candidate) -> int:
    """Choices in which two strategies differ; micro-batch and accumulation are one choice under a fixed global batch."""
    return sum(bool(getattr(a.strategy, name) != getattr(b.strategy, name)) for name in CHOICES) + 2 * (a.runtime != b.runtime)


def refusal(candidate: Candidate, reason: str) -> Failure:
    """A combination that cannot be, or is not modelled."""
    return Failure(str(candidate.strategy), reason, runtime=candidate.runtime.name)


def failure(candidate: Candidate, reason: str, over_bytes: float, memory: MemoryReport | None) -> Failure:
    """A combination that was read and breaks a limit."""
    kinds = memory.by_kind_bytes if memory else {}
    term = max(kinds, key=lambda k: kinds[k]) if kinds else ""
    return Failure(str(candidate.strategy), reason, over_bytes, term, runtime=candidate.runtime.name)


def too_large(candidate: Candidate, witness: Candidate, memory: MemoryReport, limits: Limits) -> Failure:
    """A combination that does not fit because a witness does not, which needs no more."""
    over = memory.device_bytes - memory.capacity_bytes * (1 - limits.memory_margin)
    excess = over_text(over, witness.runtime)
    if witness == candidate:
        return failure(candidate, f"out of memory by {excess} at {memory.peak_moment}", over, memory)
    reason = f"out of memory: {witness.strategy} needs no more and is over by {excess}"
    return failure(candidate, reason, over, memory)


def over_text(over_bytes: float, runtime: Runtime) -> str:
    """By how much something screened is over: where the allocator's blocks are replayed, its segments are not in that yet."""
    return f"{'at least ' if runtime.memory.replays_blocks else ''}{format_bytes(over_bytes)}"
