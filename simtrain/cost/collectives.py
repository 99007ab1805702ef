"""Collectives as loads on links plus a latency.

Every algorithm is the list of messages it sends; the loads that they put on directed links decide the time under frozen rates (the
most loaded link at its sustained rate) and are the demands of a flow in the simulation. Formulas: Thakur, Rabenseifner and Gropp 2005
(ring); Sanders, Speck and Träff 2009 (two trees).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from simtrain.core.errors import InputError
from simtrain.core.program import Resource
from simtrain.core.workload import Collective
from simtrain.cost.fabric import Fabric

Algorithm = Literal["auto", "ring", "tree"]

LAUNCH_LATENCY_S = 8.4e-6
"""Fixed cost of a collective. Source: NCCL's tuning table, ring algorithm, Simple protocol (`src/graph/tuning.cc`), 8.4 us."""

TREE_BANDWIDTH_SHARE = 0.9
"""Share of the links' rate that trees sustain, against rings. Source: NCCL's tuning table (`src/graph/tuning.cc`), tree algorithm."""


@dataclass(frozen=True, slots=True)
class CollectiveCost:
    """What a collective asks of the fabric.

    Attributes:
        algorithm: "ring" or "tree".
        latency_s: Part that no bandwidth shortens.
        loads: Bytes on each resource.
    """

    algorithm: str
    latency_s: float
    loads: dict[Resource, float]

    @property
    def time_s(self) -> float:
        """Duration when nothing else uses the links."""
        return self.latency_s + max((amount / r.capacity for r, amount in self.loads.items()), default=0.0)


def _ring(fabric: Fabric, ranks: Sequence[int], share: float, steps: int) -> CollectiveCost:
    loads: dict[Resource, float] = defaultdict(float)
    slowest = 0.0
    for source, target in zip(ranks, [*ranks[1:], ranks[0]], strict=True):
        hop, latency_s = fabric.hop(source, target)
        slowest = max(slowest, latency_s)
        for resource, weight in hop.items():
            loads[resource] += weight * share
    return CollectiveCost("ring", LAUNCH_LATENCY_S + steps * slowest, dict(loads))


def _tree(fabric: Fabric, ranks: Sequence[int], size_bytes: float) -> CollectiveCost:
    """Two trees, each for half of the data: up to the root (reduce), down again (broadcast).

    Inside a node a chain leads to the node's first rank, between nodes these form a binary tree; the second tree reverses the order.
    """
    loads: dict[Resource, float] = defaultdict(float)
    latency_s = 0.0
    for order in (list(ranks), list(reversed(ranks))):
        edges, depth_s = _tree_edges(fabric, order)
        latency_s = max(latency_s, depth_s)
        for child, parent in edges:
            for source, target in ((child, parent), (parent, child)):
                for resource, weight in fabric.hop(source, target)[0].items():
                    loads[resource] += weight * size_bytes / 2 / TREE_BANDWIDTH_SHARE
    return CollectiveCost("tree", LAUNCH_LATENCY_S + 2 * latency_s, dict(loads))


def _tree_edges(fabric: Fabric, order: Sequence[int]) -> tuple[list[tuple[int, int]], float]:
    """Edges (child, parent) of one tree, and the latency from its deepest leaf to its root."""
    by_node: dict[int, list[int]] = {}
    for rank in order:
        by_node.setdefault(fabric.places[rank][0], []).append(rank)
    chains = list(by_node.values())
    if len(chains) == 1 and len(chains[0]) > 1:
        chains = [[rank] for rank in order]  # one node: the tree is among its ranks
    edges = [pair for chain in chains for pair in zip(chain[1:], chain, strict=False)]
    leaders = [chain[0] for chain in chains]
    up = [(leaders[i], leaders[(i - 1) // 2]) for i in range(1, len(leaders))]
    inside_s = max((sum(fabric.hop(c, p)[1] for c, p in zip(chain[1:], chain, strict=False)) for chain in chains), default=0.0)
    levels = math.ceil(math.log2(len(leaders) + 1)) - 1
    across_s = levels * max((fabric.hop(c, p)[1] for c, p in up), default=0.0)
    return [*edges, *up], inside_s + across_s


def _checked(ranks: Sequence[int], size_bytes: float) -> None:
    if len(set(ranks)) != len(ranks) or not ranks:
        raise InputError(f"a collective needs distinct ranks, not {list(ranks)!r}")
    if size_bytes < 0 or not math.isfinite(size_bytes):
        raise InputError(f"a collective cannot carry {size_bytes!r} bytes")


def all_reduce(fabric: Fabric, ranks: Sequence[int], size_bytes: float, algorithm: Algorithm = "auto") -> CollectiveCost:
    """Sums a buffer over ranks, everyone gets the sum.

    A ring sends `2 (n-1)/n` of the buffer over each hop in `2 (n-1)` steps; two trees send it up and down in `2 log2 n` steps.
    "auto" takes whichever is predicted faster, which is what library tuners aim at; trees count for the rate they sustain less.

    Args:
        fabric: Routes.
        ranks: Participants in ring order.
        size_bytes: Of the buffer.
        algorithm: "auto", "ring" or "tree".

    Raises:
        InputError: Ranks repeat, or the size is negative.
    """
    _checked(ranks, size_bytes)
    n = len(ranks)
    if n == 1:
        return CollectiveCost("none", 0.0, {})
    ring = _ring(fabric, ranks, 2 * (n - 1) / n * size_bytes, 2 * (n - 1))
    if algorithm == "ring":
        return ring
    tree = _tree(fabric, ranks, size_bytes)
    return tree if algorithm == "tree" or tree.time_s < ring.time_s else ring


def all_gather(fabric: Fabric, ranks: Sequence[int], size_bytes: float) -> CollectiveCost:
    """Collects shards of a buffer of `size_bytes` in all on every rank: a ring of `n-1` steps that carries `(n-1)/n` of it.

    Raises:
        InputError: Ranks repeat, or the size is negative.
    """
    _checked(ranks, size_bytes)
    n = len(ranks)
    if n == 1:
        return CollectiveCost("none", 0.0, {})
    return _ring(fabric, ranks, (n - 1) / n * size_bytes, n - 1)


reduce_scatter = all_gather
"""Sums a buffer and leaves each rank its shard: the same messages as an all-gather, in the other direction."""


def collective(
    fabric: Fabric, kind: Collective, ranks: Sequence[int], size_bytes: float, *, concurrent: Sequence[Sequence[int]] = ()
) -> CollectiveCost:
    if kind is Collective.ALL_REDUCE:
        one = lambda r: all_reduce(fabric, r, size_bytes)
    else:
        one = lambda r: all_gather(fabric, r, size_bytes)
    base = one(ranks)
    loads = dict(base.loads)
    for other in concurrent[:16]:
        for resource, amount in one(other).loads.items():
            if resource in loads:
                loads[resource] += amount
    return CollectiveCost(base.algorithm, base.latency_s, loads)


def point_to_point(
    fabric: Fabric, source: int, target: int, size_bytes: float, *, concurrent: Sequence[Sequence[int]] = ()
) -> CollectiveCost:
    hop, latency_s = fabric.hop(source, target)
    loads = {r: w * size_bytes for r, w in hop.items()}
    for a, b in concurrent:
        for r, w in fabric.hop(a, b)[0].items():
            if r in loads:
                loads[r] += w * size_bytes
    return CollectiveCost("send", LAUNCH_LATENCY_S + latency_s, loads)
