"""How a strategy says what leaves the device between its uses: what, and whether to host memory or to NVMe drives.

`optimizer` moves the optimizer's state (and the master weights), whose update then runs on the host; `gradients` sends gradients there as
backward makes them; `parameters` keeps the weights there too and fetches them layer by layer; `activations` moves what blocks save for
backward. Parts are joined by `+`, each goes to the host unless it says `:nvme`: `optimizer+gradients`, `optimizer:nvme+parameters`.
`activations(0-3,8)` moves those of some blocks only, counted from 0 over the whole model. `delayed`, beside `optimizer+gradients`, lets the
update of a step run beside the next step, so that weights are one step late.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from simtrain.core.errors import StrategyError, nearest

MOVABLE = ("optimizer", "gradients", "parameters", "activations")
"""What can be moved."""

TIERS = ("host", "nvme")
"""Where it can go."""

DELAYED, DELAYED_FORM = "delayed", "optimizer+gradients+delayed"

_PART = re.compile(r"(\w+)\s*(?:\(([^()]*)\))?\s*(?::\s*(\w+))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True)
class Offload:
    """What is moved where: a name of `TIERS`, or "" for what stays on the device.

    Attributes:
        optimizer: Optimizer state and master weights.
        gradients: Gradients.
        parameters: Weights.
        activations: What blocks save for backward.
        blocks: Blocks whose activations move, where they are named; `None` for all but the last.
        delayed: Whether the update of a step runs beside the next one (ZeRO-Offload's delayed parameter update).
    """

    optimizer: str = ""
    gradients: str = ""
    parameters: str = ""
    activations: str = ""
    blocks: frozenset[int] | None = None
    delayed: bool = False

    @property
    def anything(self) -> bool:
        """Whether anything is moved."""
        return any(getattr(self, name) for name in MOVABLE)


def parse_offload(text: str) -> Offload:
    """Reads what a strategy moves.

    Args:
        text: Such as "none", "optimizer+gradients" or "parameters:nvme+activations(0-3,8)".

    Raises:
        StrategyError: An unknown part or place (with the nearest match), a part given twice, blocks where there can be none or out of
            order, or parts that need another one.
    """
    if text == "none":
        return Offload()
    places: dict[str, str] = {}
    blocks: frozenset[int] | None = None
    entries = [entry.strip() for entry in text.split("+")]
    delayed = DELAYED in entries
    for entry in (e for e in entries if e != DELAYED):
        match = _PART.fullmatch(entry)
        name, listed, place = match.groups() if match else (entry, None, None)
        if name not in MOVABLE:
            raise StrategyError(f"offload={text}: {_unknown(name, (*MOVABLE, DELAYED), 'no part that can be moved')}")
        if place is not None and place not in TIERS:
            raise StrategyError(f"offload={text}: {_unknown(place, TIERS, 'no place to go')}")
        if name in places:
            raise StrategyError(f"offload={text}: {name} is given twice")
        if listed is not None and name != "activations":
            raise StrategyError(f"offload={text}: only activations are moved by blocks, not {name}")
        places[name] = place or "host"
        blocks = _blocks(listed, text) if listed is not None else blocks
    for name, needs in (("gradients", "optimizer"), ("parameters", "gradients")):
        if name in places and needs not in places:
            fix = "+".join(["optimizer", *(["gradients"] if name == "parameters" else []), *(p for p in places if p != "optimizer")])
            raise StrategyError(f"offload={text}: {name} are moved only beside the {needs}, whose update needs them: use offload={fix}")
    if delayed and ("gradients" not in places or "parameters" in places or entries.count(DELAYED) > 1):
        raise StrategyError(f"offload={text}: delayed is about weights on the device that the host updates: use offload={DELAYED_FORM}")
    return Offload(blocks=blocks, delayed=delayed, **places)


def with_blocks(text: str, blocks: Iterable[int]) -> str:
    """Writes an offload with the blocks named whose activations move; without activations where there are none.

    Args:
        text: An offload that may move activations.
        blocks: Numbers of blocks.
    """
    chosen = sorted(blocks)
    parts = [part for part in text.split("+") if not part.strip().startswith("activations") and part != "none"]
    if chosen:
        place = parse_offload(text).activations
        parts.append(f"activations({_ranges(chosen)})" + (":nvme" if place == "nvme" else ""))
    return "+".join(parts) or "none"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _unknown(name: str, known: tuple[str, ...], what: str) -> str:
    near = nearest(name, known, count=1)
    return f"{name!r} is {what}: " + (f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(known)}")


def _blocks(listed: str, text: str) -> frozenset[int]:
    found: list[int] = []
    for entry in listed.split(","):
        match = _RANGE.fullmatch(entry.strip())
        if match is None:
            raise StrategyError(f"offload={text}: {entry.strip()!r} is neither a block (8) nor blocks (0-3)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or (found and first <= found[-1]):
            raise StrategyError(f"offload={text}: blocks must ascend and occur once, but {entry.strip()!r} does not")
        found += range(first, last + 1)
    return frozenset(found)


__all__ = ["MOVABLE", "TIERS", "Offload", "parse_offload", "with_blocks"]
