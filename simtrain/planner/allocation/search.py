"""The search: templates, then copies and shares for one cap on gradients after the other.

Reducing gradients takes as long as the device with most of them needs, so a plan is sought for each level of that cap. A level whose
relaxation and reduction together cannot beat what is known is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from simtrain.core.errors import InputError, NothingFitsError
from simtrain.core.polynomial import FloatArray
from simtrain.core.units import format_bytes
from simtrain.planner.allocation.bound import layer_bound_s
from simtrain.planner.allocation.counts import least_time, shares
from simtrain.planner.allocation.events import replica_s
from simtrain.planner.allocation.families import Family, family
from simtrain.planner.allocation.prices import Market, Share

LEVEL_STEP = 1.06
"""Least ratio between two caps on gradients that are both tried."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan with the time that the search expects.

    Attributes:
        shares: Replicas.
        passes_s: When the last replica has updated.
        synchronise_s: Reduction of gradients behind it.
    """

    shares: tuple[Share, ...]
    passes_s: float
    synchronise_s: float

    @property
    def kinds(self) -> frozenset[str]:
        """Device types in it."""
        return frozenset(kind for s in self.shares for kind in s.template.kinds)

    @property
    def step_time_s(self) -> float:
        """Both together."""
        return self.passes_s + self.synchronise_s


@dataclass(frozen=True, slots=True)
class Found:
    """What the search found.

    Attributes:
        proposals: Best first, one for each level of the cap.
        bound_s: What no plan can beat.
        templates: How many were looked at.
    """

    proposals: tuple[Proposal, ...]
    bound_s: float
    templates: int


def search(market: Market, templates: Family | None = None) -> Found:
    """Searches copies and shares, over all device types and over every part of them.

    Args:
        market: The question with its prices.
        templates: Of this market or of one with more devices; made anew by default.

    Raises:
        NothingFitsError: The message says which layer is in the way, if one is.
    """
    known = family(market) if templates is None else templates
    known = known.chosen([all(n <= market.counts.get(k, 0) for k, n in need.items()) for need in known.needs])
    if not known.templates:
        raise NothingFitsError(_nothing_fits(market))
    bound = layer_bound_s(market)
    proposals: list[Proposal] = []
    present = [k for k, n in market.counts.items() if n > 0]
    for size in range(len(present), 0, -1):
        for kinds in combinations(present, size):
            part = replace(market, counts={k: market.counts[k] for k in kinds})
            own = known.chosen([need.keys() <= set(kinds) for need in known.needs])
            fastest = min((p.step_time_s for p in proposals), default=np.inf)
            # a part is searched as if alone, since what is estimated of others may be wrong, but not where it cannot be faster
            if own.templates and layer_bound_s(part) < fastest:
                proposals += _searched(part, own, bound)
    if not proposals:
        raise InputError(
            f"no combination of micro-batches of {', '.join(map(str, market.micro_batches))} gives a global batch of "
            f"{market.global_batch}: use a multiple of {min(market.micro_batches)}"
        )
    distinct = {p.shares: p for p in sorted(proposals, key=lambda p: p.step_time_s)}
    return Found(tuple(distinct.values()), bound, len(known.templates))


def _searched(market: Market, templates: Family, bound_s: float) -> list[Proposal]:
    """Searches with some device types, level by level, for what may beat the best known."""
    proposals: list[Proposal] = []
    best_s = np.inf
    kinds = frozenset(market.counts)
    for cap in _levels(templates.load_bytes):
        part = templates.under(cap)
        # what is left for passes under this cap, if two replicas at least reduce
        room = best_s - (market.synchronise_s(_below(templates.load_bytes, cap), 2, kinds) if np.isfinite(best_s) else 0.0)
        limit = room if np.isfinite(room) else float(np.max(part.fill_s + part.period_s * market.global_batch)) * 2
        found = least_time(market, part, limit) if limit > bound_s else None
        divided = shares(market, part, found[1]) if found else None
        if divided:
            proposals.append(evaluate(market, divided))
            best_s = min(best_s, proposals[-1].step_time_s)
    return proposals


def evaluate(market: Market, plan: Sequence[Share]) -> Proposal:
    """Prices a plan by events: every replica exactly, then the reduction."""
    passes = max(replica_s(market, s.template, s.micro_batches) for s in plan)
    return Proposal(tuple(plan), passes, _reduction_s(market, plan))


def _reduction_s(market: Market, plan: Sequence[Share]) -> float:
    """Time to reduce gradients, every layer over the devices that hold it; all of them go on in proportion to their volume.

    The device with most to reduce decides. Under links of their own this fluid view is exact.
    """
    replicas = sum(s.copies for s in plan)
    if replicas == 1:
        return 0.0
    holders = [frozenset(s.unit.kind for p in plan for s in p.template.stages if s.start <= i < s.end) for i in range(market.layers)]
    longest = 0.0
    for template in {p.template for p in plan}:
        for stage in template.stages:
            own = market.prices[stage.unit, template.micro_batch].gradient_bytes
            held: dict[frozenset[str], float] = {}
            for i in range(stage.start, stage.end):
                held[holders[i]] = held.get(holders[i], 0.0) + float(own[i])
            longest = max(longest, sum(market.synchronise_s(size, replicas, kinds) for kinds, size in held.items()))
    return longest


def _levels(loads: FloatArray) -> list[float]:
    """Caps worth trying, from the middle outward: most of the others are then passed over at once."""
    levels: list[float] = []
    for load in np.sort(loads)[::-1].tolist():
        if not levels or load * LEVEL_STEP < levels[-1]:
            levels.append(load)
    middle = len(levels) // 2
    return sorted(levels, key=lambda x: abs(levels.index(x) - middle))


def _below(loads: FloatArray, cap: float) -> float:
    lower = loads[loads < cap / LEVEL_STEP]
    return float(lower.max()) if len(lower) else 0.0


def _nothing_fits(market: Market) -> str:
    """Why there is no template at all."""
    names = ", ".join(market.counts)
    for layer in range(market.layers):
        needs = {
            unit.kind: (float(price.fixed_bytes[layer] + price.kept_bytes[layer]), market.spare_bytes(unit, size))
            for (unit, size), price in market.prices.items()
            if size == min(market.micro_batches)
        }
        if all(need > spare for need, spare in needs.values()):
            kind, (need, spare) = max(needs.items(), key=lambda item: item[1][1] - item[1][0])
            return (
                f"layer {layer} fits on no device ({names}): at the smallest micro-batch it needs {format_bytes(need)}, "
                f"{kind} has {format_bytes(spare)} to spare; use checkpointing, a lower precision, or devices with more memory"
            )
    return f"no pipeline over {names} holds the model: use checkpointing, a lower precision, or more devices"


__all__ = ["Family", "Found", "Proposal", "evaluate", "search"]
