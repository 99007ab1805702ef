"""How a strategy says what is recomputed, beyond the fixed rules: explicit blocks, or the best choice for a budget of memory.

`layers:0-3,8` recomputes blocks 0, 1, 2, 3 and 8, each on its own; `layers:[0-3],8` recomputes blocks 0 to 3 together, as one segment
that keeps the input of block 0 alone. Blocks are counted from 0 over the whole model; what is no block (embedding, stem, head) has no
number. `optimal` and `optimal:8GiB` leave the choice to `simtrain.step.remat_choice`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from simtrain.core.errors import QuantityError, StrategyError
from simtrain.core.units import parse_quantity

Blocks = tuple[int, int]
"""Half-open range of blocks that are recomputed together."""

_ENTRY = re.compile(r"(\[)?(\d+)(?:-(\d+))?(\])?")


INSIDE = ("selective", "selective-op")
"""Rules that recompute inside blocks: what unfused attention has of the size of its scores, or operators (`simtrain.step.selective`)."""


def inside_blocks(checkpoint: str) -> str:
    """The rule, if it is one that recomputes inside blocks; else nothing."""
    return checkpoint if checkpoint in INSIDE else ""


def is_optimal(checkpoint: str) -> bool:
    """Whether the choice is left to the planner of recomputation."""
    return checkpoint.partition(":")[0] == "optimal"


def is_explicit(checkpoint: str) -> bool:
    """Whether blocks are named one by one."""
    return checkpoint.startswith("layers:")


def budget_bytes(checkpoint: str) -> float | None:
    """The device memory that an optimal choice may take; `None` for all that the device has.

    Raises:
        StrategyError: The budget is no size.
    """
    _, colon, budget = checkpoint.partition(":")
    if not colon:
        return None
    try:
        return parse_quantity(budget, "B")
    except QuantityError as error:
        raise StrategyError(f"checkpoint={checkpoint}: {error}; write optimal, or optimal:8GiB") from None


def parse_blocks(checkpoint: str) -> tuple[Blocks, ...]:
    """Reads which blocks are recomputed, and which of them together.

    Args:
        checkpoint: Such as "layers:0-3,8" or "layers:[0-3],8".

    Raises:
        StrategyError: Broken text, or blocks out of order or given twice.
    """
    found: list[Blocks] = []
    for entry in checkpoint.removeprefix("layers:").split(","):
        match = _ENTRY.fullmatch(entry.strip())
        if match is None or bool(match[1]) != bool(match[4]):
            raise StrategyError(f"checkpoint={checkpoint}: {entry!r} is neither a block (8), blocks (0-3) nor a segment of blocks ([0-3])")
        first = int(match[2])
        last = int(match[3]) if match[3] else first
        if last < first or (found and first < found[-1][1]):
            raise StrategyError(f"checkpoint={checkpoint}: blocks must ascend and occur once, but {entry!r} does not")
        found += [(first, last + 1)] if match[1] else [(i, i + 1) for i in range(first, last + 1)]
    return tuple(found)


def blocks_text(blocks: Iterable[Blocks]) -> str:
    """Writes what `parse_blocks` reads; "none" where nothing is recomputed."""
    entries: list[str] = []
    run: list[int] = []

    def close() -> None:
        if run:
            entries.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            run.clear()

    for start, stop in blocks:
        if stop - start > 1 or (run and start != run[-1] + 1):
            close()
        if stop - start > 1:
            entries.append(f"[{start}-{stop - 1}]")
        else:
            run.append(start)
    close()
    return f"layers:{','.join(entries)}" if entries else "none"


def blocks_within(checkpoint: str, start: int, stop: int) -> str:
    """Writes what explicit blocks say of a range of them, counted from its start; other rules as they are.

    Args:
        checkpoint: As a strategy says it.
        start: First block of the range.
        stop: Behind its last.

    Raises:
        StrategyError: Blocks that are recomputed together lie on both sides of an end.
    """
    if not is_explicit(checkpoint):
        return checkpoint
    inside = []
    for first, behind in parse_blocks(checkpoint):
        if first < start < behind or first < stop < behind:
            cut = start if first < start < behind else stop
            raise StrategyError(
                f"checkpoint={checkpoint}: a stage begins with block {cut}, so that [{first}-{behind - 1}] cannot be recomputed together"
            )
        if start <= first and behind <= stop:
            inside.append((first - start, behind - start))
    return blocks_text(inside)


__all__ = ["INSIDE", "Blocks", "blocks_text", "blocks_within", "budget_bytes", "inside_blocks", "is_explicit", "is_optimal", "parse_blocks"]
