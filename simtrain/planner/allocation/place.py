"""Replicas on the real fabric: which ranks carry which stage, stages of a replica in one node where they go in, then swaps that help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from simtrain.core.errors import InputError
from simtrain.planner.allocation.kinds import Kind
from simtrain.planner.allocation.prices import Share, Unit

MOST_SWAPS = 120
"""Placements that are priced to improve on the first."""

Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlacedShare:
    """Equal replicas with their ranks.

    Attributes:
        share: The replicas.
        copies: Of each copy the ranks of each stage.
    """

    share: Share
    copies: tuple[tuple[Ranks, ...], ...]


Placement = tuple[PlacedShare, ...]


def place_shares(kinds: Mapping[str, Kind], plan: Sequence[Share], *, together: Literal["replica", "stage"] = "replica") -> Placement:
    """Gives stages their ranks, wide replicas first.

    Args:
        kinds: Whose devices.
        plan: Replicas.
        together: What shares nodes: the stages of a replica (short ways for activations) or like stages (short ways for gradients).

    Raises:
        InputError: Tensor-parallel groups do not go into the nodes.
    """
    free = {name: [list(ranks) for ranks in kind.nodes] for name, kind in kinds.items()}
    found: list[list[list[Ranks]]] = [[[() for _ in p.template.stages] for _ in range(p.copies)] for p in plan]
    order = sorted(range(len(plan)), key=lambda i: -max(s.unit.tensor for s in plan[i].template.stages))
    for i in order:
        stages = plan[i].template.stages
        slots = [(c, s) for c in range(plan[i].copies) for s in range(len(stages))]
        for c, s in slots if together == "replica" else sorted(slots, key=lambda slot: slot[1]):
            unit = stages[s].unit
            left = stages[s:] if together == "replica" else ()
            wanted = sum(x.unit.tensor for x in left if x.unit.kind == unit.kind)
            before = found[i][c][s - 1] if s and together == "replica" else ()
            found[i][c][s] = _taken(free[unit.kind], unit, wanted, before)
    return tuple(PlacedShare(p, tuple(tuple(copy) for copy in copies)) for p, copies in zip(plan, found, strict=True))


def _taken(nodes: list[list[int]], unit: Unit, wanted: int, before: Ranks) -> Ranks:
    """Takes a unit's devices: behind those of the stage before, else where all that is wanted goes in, tightest first."""
    possible = [node for node in nodes if len(node) >= unit.tensor]
    if not possible:
        raise InputError(f"{unit.tensor} free devices of {unit.kind} in one node are needed, but none has them left")
    node = min(
        possible,
        key=lambda n: (
            not before or n[0] - 1 != before[-1],
            len(n) < wanted,
            len(n) if wanted and len(n) >= wanted else -len(n) * bool(wanted),
        ),
    )
    ranks = tuple(node[: unit.tensor])
    del node[: unit.tensor]
    return ranks


def improve(placement: Placement, price_s: Callable[[Placement], float], budget: int = MOST_SWAPS) -> tuple[Placement, float]:
    """Swaps equal units between places while that makes the step faster.

    Args:
        placement: To begin with.
        price_s: Time of a step with a placement.
        budget: Most placements to price.
    """
    best, tried = price_s(placement), 1
    moved = True
    while moved and tried < budget:
        moved = False
        for a, b in combinations(_slots(placement), 2):
            if _unit(placement, a) != _unit(placement, b) or a[2] == b[2]:
                continue
            if tried >= budget:
                break
            other = _swapped(placement, a, b)
            tried += 1
            if (time := price_s(other)) < best * (1 - 1e-6):
                placement, best, moved = other, time, True
    return placement, best


Slot = tuple[int, int, int]
"""A share, a copy of it, and a stage."""


def _slots(placement: Placement) -> list[Slot]:
    return [(i, c, s) for i, p in enumerate(placement) for c in range(p.share.copies) for s in range(len(p.share.template.stages))]


def _unit(placement: Placement, slot: Slot) -> tuple[str, int]:
    unit = placement[slot[0]].share.template.stages[slot[2]].unit
    return unit.kind, unit.tensor


def _swapped(placement: Placement, a: Slot, b: Slot) -> Placement:
    at = {s: placement[s[0]].copies[s[1]][s[2]] for s in (a, b)}
    to = {a: at[b], b: at[a]}
    return tuple(
        PlacedShare(
            p.share,
            tuple(tuple(to.get((i, c, s), ranks) for s, ranks in enumerate(copy)) for c, copy in enumerate(p.copies)),
        )
        for i, p in enumerate(placement)
    )
