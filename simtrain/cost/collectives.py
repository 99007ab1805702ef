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
    """Two complementary binary trees, each for half of the data: up to the root (reduce), down again (broadcast)."""
    loads: dict[Resource, float] = defaultdict(float)
    slowest = 0.0
    for order in (list(ranks), list(reversed(ranks))):
        for child in range(1, len(order)):
            parent = (child - 1) // 2
            for source, target in ((order[child], order[parent]), (order[parent], order[child])):
                hop, latency_s = fabric.hop(source, target)
                slowest = max(slowest, latency_s)
                for resource, weight in hop.items():
                    loads[resource] += weight * size_bytes / 2 / TREE_BANDWIDTH_SHARE
    depth = math.ceil(math.log2(len(ranks) + 1)) - 1 if len(ranks) > 1 else 0
    return CollectiveCost("tree", LAUNCH_LATENCY_S + 2 * max(depth, 1) * slowest, dict(loads))


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
