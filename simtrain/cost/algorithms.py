"""Algorithms of collectives as plans: the messages of one byte's worth of a collective, and the latency.

Formulas: Thakur, Rabenseifner and Gropp 2005 (ring, halving-doubling, binomial broadcast, pairwise exchange); Sanders, Speck and Träff 2009
(two trees); NVIDIA's NVLink SHARP (in-network: multicast reads and writes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from simtrain.core.errors import UnsupportedError
from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray
from simtrain.core.workload import Collective
from simtrain.cost.fabric import Fabric
from simtrain.cost.traffic import Flows, Plan, SwitchFlows, Traffic
from simtrain.cost.tuner import HOP_US

LAUNCH_LATENCY_S = 8.4e-6
"""Fixed cost of a collective. Source: NCCL's tuning table, ring algorithm, Simple protocol (`src/graph/tuning.cc`), 8.4 us."""

RAMP_S = 30e-6
"""What a large collective of a GPU takes longer than a small one beside its hops. Source: all-reduces of up to 8 A100 over NVLink, vTrain's
shipped NCCL tables: 31 us + 7.7 us per rank at sizes from 1 MiB, against 8.4 us + 1.9 us per hop of small messages."""

SIMPLE_HOPS = 1.0
"""Latency of a hop that the Simple protocol adds to LL128's, over the latter: 0.8 over NVLink, 1.4 over the network. Source: NCCL's tuning
table (`src/graph/tuning.cc`, rings). For trees the same table has both latencies of a hop (`cost/tuner.py`)."""

TREE_BANDWIDTH_SHARE = 0.9
"""Share of the links' rate that trees sustain, against rings. Source: NCCL's tuning table (`src/graph/tuning.cc`), tree algorithm."""

SWITCH_BANDWIDTH_SHARE = 0.85
"""Share of the links' rate that reductions in NVLink switches sustain, against rings. Source: `nvlsEfficiency` of Hopper in NCCL's
tuner, as third-party notes on its source quote it (not read in NCCL itself)."""

SWITCH_LATENCY_S = 25e-6
"""Latency of a reduction in a node's switch. Source: latency of NVLS over NVLink in NCCL's tuner, 25 us, as quoted by
third-party notes (not read in NCCL itself)."""

NETWORK_SWITCH_LATENCY_S = 30e-6
"""Latency of a reduction in the network's switches. Source: latency of CollNetChain over the network in NCCL's tuner, 30 us,
as quoted by third-party notes (not read in NCCL itself)."""


REDUCING = (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER)


def plan(fabric: Fabric, collective: Collective, algorithm: str, ranks: IntArray) -> Plan:
    """Plans a collective of one byte.

    Args:
        fabric: Routes.
        collective: What is done.
        algorithm: A name in `ALGORITHMS[collective]`.
        ranks: Participants, at least two, in order.

    Raises:
        UnsupportedError: There is no such algorithm for the collective, or not for this group; the message says what is missing.
    """
    available = ALGORITHMS[collective]
    if algorithm not in available:
        raise UnsupportedError(f"{collective} has no algorithm {algorithm!r}: it has {', '.join(available)}")
    return available[algorithm](fabric, collective, ranks)


def _passes(collective: Collective) -> int:
    """An all-reduce is a reduce-scatter and an all-gather."""
    return 2 if collective is Collective.ALL_REDUCE else 1


def _ring_latency_s(hops_s: FloatArray, passes: int) -> float:
    """Latency of `passes` times all but one hop of a ring: the slowest way of a piece around it, wherever it starts."""
    skipped = hops_s if passes == 1 else hops_s + np.roll(hops_s, 1)
    return passes * float(hops_s.sum()) - float(skipped.min())


def _ring(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    n, target = len(ranks), np.roll(ranks, -1)
    hops_s = fabric.latencies_s(ranks, target)
    passes = _passes(collective)
    flows = Flows(ranks, target, np.full(n, passes * (n - 1) / n))
    around_s = _ring_latency_s(hops_s, passes)
    return Plan("ring", (Traffic((flows,)),), LAUNCH_LATENCY_S + around_s, ramp_s=_ramp_s(fabric, ranks, around_s))


def _ramp_s(fabric: Fabric, ranks: IntArray, hops_s: float) -> float:
    """What a large message adds to the latency, given that of its hops; only GPUs' library changes protocols."""
    return RAMP_S + SIMPLE_HOPS * hops_s if fabric.device_class(int(ranks[0])) == "gpu" else 0.0


def _chain(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    """A broadcast around the ring in many small pieces."""
    del collective
    flows = Flows(ranks[:-1], ranks[1:], np.ones(len(ranks) - 1))
    return Plan("ring", (Traffic((flows,)),), LAUNCH_LATENCY_S + float(fabric.latencies_s(flows.source, flows.target).sum()))


def _tree(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    """Two trees, each for half of the data: up to the root (reduce), down again (broadcast).

    Inside a node a chain leads to the node's first rank, between nodes these form a binary tree; the second tree reverses the order.
    """
    del collective
    flows: list[Flows] = []
    deepest_s = ramp_s = 0.0
    for order in (ranks, ranks[::-1]):
        child, parent, depth_s, large_s = _tree_edges(fabric, order)
        deepest_s, ramp_s = max(deepest_s, depth_s), max(ramp_s, 2 * (large_s - depth_s))
        half = np.full(len(child), 0.5)
        flows += [Flows(child, parent, half), Flows(parent, child, half)]
    ramp_s = ramp_s if fabric.device_class(int(ranks[0])) == "gpu" else 0.0
    return Plan("tree", (Traffic(tuple(flows)),), LAUNCH_LATENCY_S + 2 * deepest_s, TREE_BANDWIDTH_SHARE, ramp_s)


def _tree_edges(fabric: Fabric, order: IntArray) -> tuple[IntArray, IntArray, float, float]:
    """Edges (child, parent) of one tree, and the latency from its deepest leaf to its root, of small and of large messages."""
    node = fabric.node_of[order]
    _, first, counts = np.unique(node, return_index=True, return_counts=True)
    if len(counts) == 1:
        leaders, child, parent = order, order[:0], order[:0]  # one node: the tree is among its ranks
    else:
        by_node = order[np.argsort(first[np.searchsorted(np.unique(node), node)], kind="stable")]
        follows = np.concatenate([[False], fabric.node_of[by_node][1:] == fabric.node_of[by_node][:-1]])
        child, parent = by_node[follows], by_node[np.roll(follows, -1)]
        leaders = by_node[~follows]
    hops = fabric.node_of[child]
    chain_s = np.bincount(hops, fabric.latencies_s(child, parent)).max(initial=0.0)
    position = np.arange(1, len(leaders))
    up, above = leaders[position], leaders[(position - 1) // 2]
    levels = math.ceil(math.log2(len(leaders) + 1)) - 1
    across_s = levels * fabric.latencies_s(up, above).max(initial=0.0)
    large_us = np.bincount(hops).max(initial=0) * HOP_US["nvlink"]["tree"][-1] + levels * HOP_US["network"]["tree"][-1]
    depth_s = float(chain_s + across_s)
    return np.concatenate([child, up]), np.concatenate([parent, above]), depth_s, max(large_us * 1e-6, depth_s)


def _halving_doubling(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    """Neighbours exchange half of the buffer, then those two apart a quarter, and so on; gathering goes the other way."""
    n = len(ranks)
    rounds = n.bit_length() - 1
    if n != 1 << rounds:
        raise UnsupportedError(f"halving-doubling is modelled for groups of a power of two, not of {n} ranks")
    phases, latency_s, position = [], LAUNCH_LATENCY_S, np.arange(n)
    for k in range(rounds):
        target = ranks[position ^ (1 << k)]
        phases.append(Traffic((Flows(ranks, target, np.full(n, 0.5 ** (k + 1))),)))
        latency_s += _passes(collective) * float(fabric.latencies_s(ranks, target).max())
    order = phases if collective in REDUCING else phases[::-1]
    return Plan("halving-doubling", (*order, *(phases[::-1] if _passes(collective) == 2 else ())), latency_s)


def _hierarchical(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    """Rings inside nodes, rings between the ranks at the same place in each node, on their shards; one after the other."""
    rows = _by_node(fabric, ranks, "hierarchical")
    nodes, inside = rows.shape
    within = _rings(rows, (inside - 1) / inside)
    between = _rings(rows.T, _passes(collective) * (nodes - 1) / nodes / inside)
    within_s = max(_ring_latency_s(fabric.latencies_s(row, np.roll(row, -1)), 1) for row in rows) if inside > 1 else 0.0
    column = rows[:, 0]
    between_s = _ring_latency_s(fabric.latencies_s(column, np.roll(column, -1)), _passes(collective))
    phases = {
        Collective.ALL_REDUCE: (within, between, within),
        Collective.REDUCE_SCATTER: (within, between),
        Collective.ALL_GATHER: (between, within),
    }[collective]
    latency_s = LAUNCH_LATENCY_S + _passes(collective) * within_s + between_s
    return Plan("hierarchical", tuple(Traffic((flows,)) for flows in phases), latency_s)


def _by_node(fabric: Fabric, ranks: IntArray, name: str) -> IntArray:
    """Ranks as a matrix with a row per node."""
    node = fabric.node_of[ranks]
    _, counts = np.unique(node, return_counts=True)
    if len(counts) < 2 or len(set(counts.tolist())) > 1:
        raise UnsupportedError(
            f"{name} needs the same number of ranks on each of several nodes; nodes hold {counts.tolist()} of this group"
        )
    return ranks[np.argsort(node, kind="stable")].reshape(len(counts), -1)


def _rings(rows: IntArray, size_bytes: float) -> Flows:
    """One ring along each row."""
    return Flows(rows.ravel(), np.roll(rows, -1, axis=1).ravel(), np.full(rows.size, size_bytes))


def _torus(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    """Rings along every axis at once: the buffer is cut into a part for each axis and direction, and each part takes the axes in turn."""
    box = _box(fabric, ranks)
    axes = [axis for axis, extent in enumerate(box.shape) if extent > 1]
    lines = {axis: np.moveaxis(box, axis, -1).reshape(-1, box.shape[axis]) for axis in axes}
    if collective is Collective.ALL_TO_ALL:
        return _torus_exchange(fabric, lines)
    hops_s = {axis: _ring_latency_s(fabric.latencies_s(line[0], np.roll(line[0], -1)), 1) for axis, line in lines.items()}
    left = dict.fromkeys(range(len(axes)), 1 / len(axes))  # of each part, on every rank
    phases, latency_s = [], LAUNCH_LATENCY_S
    for turn in range(len(axes)):
        flows: list[Flows] = []
        for part in range(len(axes)):
            axis = axes[(part + turn) % len(axes)]
            extent = box.shape[axis]
            half = left[part] * (extent - 1) / extent / 2
            flows += [_rings(lines[axis], half), _rings(lines[axis][:, ::-1], half)]
            left[part] /= extent
        phases.append(Traffic(tuple(flows)))
        latency_s += _passes(collective) * max(hops_s.values())
    order = phases if collective in REDUCING else phases[::-1]
    return Plan("torus", (*order, *(phases[::-1] if _passes(collective) == 2 else ())), latency_s)


def _torus_exchange(fabric: Fabric, lines: Mapping[int, IntArray]) -> Plan:
    """All messages at once in dimension order: along an axis of k ranks every rank sends 1/k of a byte on to each other one."""
    flows, latency_s = [], LAUNCH_LATENCY_S
    for line in lines.values():
        extent = line.shape[1]
        source, target = np.repeat(line, extent, axis=1).ravel(), np.tile(line, extent).ravel()
        other = source != target
        flows.append(Flows(source[other], target[other], np.full(int(other.sum()), 1 / extent)))
        latency_s += float(fabric.latencies_s(np.full(extent, line[0, 0]), line[0]).sum())
    return Plan("torus", (Traffic(tuple(flows)),), latency_s)


def _box(fabric: Fabric, ranks: IntArray) -> IntArray:
    """Ranks by their coordinates in the torus."""
    torus = fabric.topology.torus
    if torus is None:
        raise UnsupportedError(
            f"torus needs a cluster whose network is a torus; {fabric.cluster.name!r} has a {fabric.cluster.network.kind}"
        )
    places = [np.unique(row, return_inverse=True) for row in torus.coordinates(ranks)]
    shape = tuple(len(values) for values, _ in places)
    if math.prod(shape) != len(ranks):
        raise UnsupportedError(f"torus needs a group that fills a box of the torus; {len(ranks)} ranks lie in a box of {shape}")
    box = np.empty(shape, dtype=np.int64)
    box[tuple(index for _, index in places)] = ranks
    return box


def _in_network(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    """Switches add up: inside a node every rank reads its shard summed and writes it to all; between nodes each sends the buffer once."""
    del collective
    n, nodes = len(ranks), np.unique(fabric.node_of[ranks])
    machines = [fabric.cluster.nodes[k] for k in nodes]
    if len(nodes) == 1:
        if not machines[0].peer_reduction or len(np.unique(fabric.peers_of[ranks])) > 1:
            raise UnsupportedError(f"in-network needs a peer switch that adds up: set peer_reduction on node {nodes[0]} if it has one")
        through = SwitchFlows(ranks, 1 + 1 / n, 1 + 1 / n)
        return Plan("in-network", (Traffic((), (through,)),), LAUNCH_LATENCY_S + SWITCH_LATENCY_S, SWITCH_BANDWIDTH_SHARE, RAMP_S)
    if not fabric.cluster.network.in_network_reduction:
        raise UnsupportedError("in-network needs network switches that add up: set network.in_network_reduction if they do")
    latency_s = LAUNCH_LATENCY_S + NETWORK_SWITCH_LATENCY_S
    rows = _by_node(fabric, ranks, "in-network")
    flows: tuple[Flows, ...] = ()
    if rows.shape[1] > 1:
        inside = rows.shape[1]
        flows = (_rings(rows, 2 * (inside - 1) / inside),)
        latency_s += 2 * max(_ring_latency_s(fabric.latencies_s(row, np.roll(row, -1)), 1) for row in rows)
    return Plan("in-network", (Traffic(flows, (SwitchFlows(rows[:, 0], 1.0, 1.0, between_nodes=True),)),), latency_s)


def _direct(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    """Every rank sends to every other, one after the other (pairwise exchange); of nodes that share ports only the sum matters."""
    del collective
    n = len(ranks)
    node = fabric.node_of[ranks]
    _, first, place, counts = np.unique(node, return_index=True, return_inverse=True, return_counts=True)
    a, b = np.nonzero(place[:, None] == place) if fabric.topology.torus is None else np.nonzero(np.ones((n, n)))
    other = a != b
    inside = Flows(ranks[a[other]], ranks[b[other]], np.full(int(other.sum()), 1 / n))
    flows = [inside]
    if fabric.topology.torus is None and len(counts) > 1:
        c, d = np.nonzero(~np.eye(len(counts), dtype=bool))
        flows.append(Flows(ranks[first[c]], ranks[first[d]], counts[c] * counts[d] / n))
    hops_s = fabric.latencies_s(np.full(n - 1, ranks[0]), ranks[1:])
    return Plan("direct", (Traffic(tuple(flows)),), LAUNCH_LATENCY_S + float(hops_s.sum()))


def _message(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    del collective
    flows = Flows(ranks[:1], ranks[1:], np.ones(1))
    return Plan("direct", (Traffic((flows,)),), LAUNCH_LATENCY_S + float(fabric.latencies_s(flows.source, flows.target)[0]))


def _binomial(fabric: Fabric, collective: Collective, ranks: IntArray) -> Plan:
    """In each round everyone who has the message sends it on."""
    del collective
    n, phases, latency_s, have = len(ranks), [], LAUNCH_LATENCY_S, 1
    while have < n:
        source = np.arange(min(have, n - have))
        flows = Flows(ranks[source], ranks[source + have], np.ones(len(source)))
        phases.append(Traffic((flows,)))
        latency_s += float(fabric.latencies_s(flows.source, flows.target).max())
        have *= 2
    return Plan("tree", tuple(phases), latency_s)


Planner = Callable[[Fabric, Collective, IntArray], Plan]

_SHARDED: Mapping[str, Planner] = {"ring": _ring, "halving-doubling": _halving_doubling, "hierarchical": _hierarchical, "torus": _torus}

ALGORITHMS: Mapping[Collective, Mapping[str, Planner]] = {
    Collective.ALL_REDUCE: {**_SHARDED, "tree": _tree, "in-network": _in_network},
    Collective.ALL_GATHER: _SHARDED,
    Collective.REDUCE_SCATTER: _SHARDED,
    Collective.ALL_TO_ALL: {"direct": _direct, "torus": _torus},
    Collective.BROADCAST: {"ring": _chain, "tree": _binomial},
    Collective.POINT_TO_POINT: {"direct": _message},
}
"""What each collective can be carried out with."""
