"""The exact cut of a pipeline: which layers each of its units runs, so that the slowest stage is as fast as can be.

Dynamic program over (stage, last layer), under the memory that each stage has with as many micro-batches in flight as its place in the
pipeline asks for, and under a cap on the gradients that a device holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.planner.allocation.prices import Market, StageUse, Template, Unit


def splits(market: Market, units: Sequence[Unit], micro_batch: int, caps: FloatArray) -> list[Template | None]:
    """Cuts the model over units in order; one answer for each cap, `None` where nothing fits.

    Args:
        market: Prices.
        units: Of the stages.
        micro_batch: Samples.
        caps: Most gradient bytes on a device, falling.
    """
    reach: list[FloatArray] = []
    for s, unit in enumerate(units):
        own = stage_costs(market, units, s, micro_batch)
        held = market.gradients(market.variants(unit, micro_batch)[0], micro_batch)
        cost = np.where(held[None] <= caps[:, None, None], own[None], np.inf)
        if s == 0:
            reach.append(cost[:, 0, :])
        else:
            # ending at layer j, this stage beginning behind layer i
            both = np.maximum(reach[-1][:, :-1, None], cost[:, 1:, :])
            reach.append(both.min(axis=1))
    found: list[Template | None] = []
    for k, cap in enumerate(caps.tolist()):
        before = found[-1] if found else None
        # under a tighter cap that changes nothing the answer stays
        same = before is not None and reach[-1][k, -1] == reach[-1][k - 1, -1] and load_bytes(market, before) <= cap
        found.append(before if same else _traced(market, units, micro_batch, cap, [r[k] for r in reach]))
    return found


def room(market: Market, units: Sequence[Unit], micro_batch: int) -> tuple[tuple[bytes, ...], ...]:
    """Which ranges of layers fit on each stage, with each checkpointing and precision: where nothing else differs, equal cuts follow."""
    return tuple(_room(market, unit, micro_batch, len(units) - s) for s, unit in enumerate(units))


def _room(market: Market, unit: Unit, micro_batch: int, in_flight: int) -> tuple[bytes, ...]:
    key = (unit.shape, micro_batch, in_flight)
    if key not in market.known_room:
        costs = (_fitting(market, v, micro_batch, in_flight) for v in market.variants(unit, micro_batch))
        market.known_room[key] = tuple(np.packbits(np.isfinite(cost)).tobytes() for cost in costs)
    return market.known_room[key]


def load_bytes(market: Market, template: Template) -> float:
    """Most gradient bytes on a device of a replica."""
    return max(float(market.gradients(s.unit, template.micro_batch)[s.start, s.end - 1]) for s in template.stages)


def stage_costs(market: Market, units: Sequence[Unit], stage: int, micro_batch: int) -> FloatArray:
    """What a micro-batch takes a stage, transfers that it waits for included, for every range of layers; infinite where it does not fit."""
    unit = units[stage]
    key = ("fitting", unit.shape, micro_batch, len(units) - stage)
    if key not in market.known:
        variants = market.variants(unit, micro_batch)
        market.known[key] = np.min([_fitting(market, v, micro_batch, len(units) - stage) for v in variants], axis=0)
    return market.known[key] + _sending(market, units, stage, micro_batch)


def _fitting(market: Market, unit: Unit, micro_batch: int, in_flight: int) -> FloatArray:
    """Times of one kind of checkpointing and precision, infinite where memory does not suffice."""
    key = ("variant", unit, micro_batch, in_flight)
    if key not in market.known:
        fits = market.memory_bytes(unit, micro_batch, in_flight) <= market.spare_bytes(unit, micro_batch)
        market.known[key] = np.where(fits, market.stage_s(unit, micro_batch), np.inf)
    return market.known[key]


def _sending(market: Market, units: Sequence[Unit], stage: int, micro_batch: int) -> float:
    if market.transfers == "asynchronous":
        return 0.0
    sends = market.sends_s(units, micro_batch)
    ends = 2 if market.transfers == "rendezvous" else 1
    return ends * sum(sends[max(stage - 1, 0) : stage + 1])


def _traced(market: Market, units: Sequence[Unit], micro_batch: int, cap: float, reach: list[FloatArray]) -> Template | None:
    if not np.isfinite(reach[-1][-1]):
        return None
    end, found, stages = market.layers, [], len(units)
    for s in range(stages - 1, -1, -1):
        start = 0
        if s:
            cost = stage_costs(market, units, s, micro_batch)[1:, end - 1]
            held = market.gradients(market.variants(units[s], micro_batch)[0], micro_batch)
            cost = np.where(held[1:, end - 1] <= cap, cost, np.inf)
            start = int(np.argmin(np.maximum(reach[s - 1][:-1], cost))) + 1
        variants = market.variants(units[s], micro_batch)
        unit = min(variants, key=lambda v: _fitting(market, v, micro_batch, stages - s)[start, end - 1])
        found.append(StageUse(unit, start, end))
        end = start
    return Template(tuple(reversed(found)), micro_batch)
