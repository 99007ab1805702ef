"""Replicas on the real fabric: which ranks carry which stage, stages of a replica in one node where they go in, then swaps that help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from simtrain.core.errors import InputError
from simtrain.planner.allocation.kinds import Kind
from simtrain.planner.allocation.prices import Share

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


def place_shares(kinds: dict[str, Kind], plan: Sequence[Share]) -> Placement:
    """Gives stages their ranks, large replicas first; a replica goes where its devices of a kind fit into one node, tightest first.

    Raises:
        InputError: Tensor-parallel groups do not go into the nodes.
    """
    free = {name: [list(ranks) for ranks in kind.nodes] for name, kind in kinds.items()}
    order = sorted(range(len(plan)), key=lambda i: -max(s.unit.tensor for s in plan[i].template.stages))
    found: dict[int, PlacedShare] = {}
    for i in order:
        found[i] = PlacedShare(plan[i], tuple(_placed(free, plan[i]) for _ in range(plan[i].copies)))
    return tuple(found[i] for i in range(len(plan)))


def _placed(free: dict[str, list[list[int]]], share: Share) -> tuple[Ranks, ...]:
    stages: list[Ranks] = []
    for s, stage in enumerate(share.template.stages):
        unit = stage.unit
        rest = sum(x.unit.tensor for x in share.template.stages[s:] if x.unit.kind == unit.kind)
        nodes = [node for node in free[unit.kind] if len(node) >= unit.tensor]
        if not nodes:
            raise InputError(f"{unit.tensor} free devices of {unit.kind} in one node are needed, but none has them left")
        near = [node for node in nodes if stages and min(node) - 1 == max(stages[-1])]
        node = min(nodes, key=lambda n: (n not in near, len(n) < rest, len(n) if len(n) >= rest else -len(n)))
        stages.append(tuple(node[: unit.tensor]))
        del node[: unit.tensor]
    return tuple(stages)


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
