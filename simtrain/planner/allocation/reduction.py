"""Gradients of replicas that are cut differently: every shared range of layers is reduced over the devices that hold it.

Of each range every part (as many as the widest holder has tensor-parallel ranks) is an all-reduce over one device of each replica. All
run at once; each goes on in proportion to its volume, so that the most loaded link decides: the sum of their loads on every link.
"""

from __future__ import annotations

from itertools import pairwise

from simtrain.core.program import Resource
from simtrain.core.workload import Collective
from simtrain.cost.collectives import CollectiveCost, collective
from simtrain.planner.allocation.engine_prices import tied_bytes
from simtrain.planner.allocation.place import Placement
from simtrain.planner.allocation.prices import Market
from simtrain.planner.allocation.stages import Job


def reduction(job: Job, market: Market, placement: Placement) -> CollectiveCost:
    """Loads and latency of reducing all gradients, weighted by the samples of each replica (which costs nothing on the wire).

    Args:
        job: Fabric.
        market: Gradient bytes of layers on units.
        placement: Replicas with their ranks.
    """
    loads: dict[Resource, float] = {}
    latency = traffic = 0.0
    names: dict[str, None] = {}
    pipelined = all(len(p.share.template.stages) > 1 for p in placement)  # then both ends reduce a weight that they share
    cuts = sorted({0, market.layers, *(s.end for p in placement for s in p.share.template.stages)})
    for start, end in pairwise(cuts):
        holders = [
            (stage.unit, p.share.template.micro_batch, copy[s])
            for p in placement
            for s, stage in enumerate(p.share.template.stages)
            if stage.start <= start < stage.end
            for copy in p.copies
        ]
        if len(holders) < 2:
            continue
        unit, size, _ = max(holders, key=lambda h: h[0].tensor)
        held = float(market.prices[unit, size].gradient_bytes[start:end].sum())
        if end == market.layers and pipelined:
            held += tied_bytes(job, job.setting(unit, size, 1, 2, len(holders)))
        for part in range(unit.tensor):
            ring = sorted(ranks[part * len(ranks) // unit.tensor] for _, _, ranks in holders)
            cost = collective(job.fabric, Collective.ALL_REDUCE, ring, held)
            names[cost.algorithm] = None
            latency = max(latency, cost.latency_s)
            traffic += cost.traffic_bytes if part == 0 else 0.0
            for resource, amount in cost.loads.items():
                loads[resource] = loads.get(resource, 0.0) + amount
    return CollectiveCost(" and ".join(names) or "none", latency, loads, traffic)
