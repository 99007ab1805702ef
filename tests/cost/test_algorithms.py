"""Algorithms of collectives: closed forms, conservation, lower bounds, and networks that limit them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import InputError, UnknownNameError, UnsupportedError
from simtrain.core.hardware import Cluster, Link, Node
from simtrain.core.network import Network
from simtrain.cost.algorithms import ALGORITHMS, LAUNCH_LATENCY_S, RAMP_S, SIMPLE_HOPS, SWITCH_BANDWIDTH_SHARE, TREE_BANDWIDTH_SHARE
from simtrain.cost.collectives import RAMP_BYTES, Collective, collective, point_to_point
from simtrain.cost.fabric import Fabric

INSIDE, BETWEEN, HOST = Link("inside", 1e10, 1.0, 1e-6), Link("between", 1e9, 1.0, 1e-5), Link("host", 1e11, 1.0, 1e-6)
AR, AG, RS, A2A, BC = (Collective[k] for k in ("ALL_REDUCE", "ALL_GATHER", "REDUCE_SCATTER", "ALL_TO_ALL", "BROADCAST"))
SIZE = 1e9


def fabric(count, per_node, *, nics=0, network=None, **node):
    device = st.device("h100-sxm")
    machine = Node((device,) * per_node, None, HOST, INSIDE, 0, BETWEEN, nics or per_node)
    network = network or Network()
    return Fabric(Cluster("test", (replace(machine, **node),) * count, network=network))


def torus(*dimensions, wraparound=()):
    ranks = int(np.prod(dimensions))
    return fabric(ranks, 1, network=Network("torus", dimensions=dimensions, wraparound=wraparound))


def seconds(cost):
    """Time without the fixed latency, to compare with bandwidth terms."""
    return cost.time_s - cost.latency_s


# Closed forms on one switch: alpha 1 us, rate B.


@given(n=some.integers(2, 24), size=some.floats(1.0, 1e12))
@settings(max_examples=30, deadline=None)
def test_rings_exchanges_and_broadcasts_on_a_switch(n, size):
    f, alpha, beta = fabric(1, n), 1e-6, size / 1e10
    for kind, steps, share in ((AR, 2 * (n - 1), 2 * (n - 1) / n), (AG, n - 1, (n - 1) / n), (RS, n - 1, (n - 1) / n), (BC, n - 1, 1.0)):
        cost = collective(f, kind, range(n), size, algorithm="ring")
        ramp_s = 0.0 if kind is BC else (RAMP_S + SIMPLE_HOPS * steps * alpha) * size / (size + RAMP_BYTES)
        assert cost.time_s == pytest.approx(LAUNCH_LATENCY_S + steps * alpha + ramp_s + share * beta)
    cost = collective(f, A2A, range(n), size, algorithm="direct")
    assert cost.time_s == pytest.approx(LAUNCH_LATENCY_S + (n - 1) * alpha + (n - 1) / n * beta)
    rounds = int(np.ceil(np.log2(n)))
    cost = collective(f, BC, range(n), size, algorithm="tree")
    assert cost.time_s == pytest.approx(LAUNCH_LATENCY_S + rounds * (alpha + beta))


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_halving_doubling_on_a_switch(n):
    cost = collective(fabric(1, n), AR, range(n), SIZE, algorithm="halving-doubling")
    assert cost.time_s == pytest.approx(LAUNCH_LATENCY_S + 2 * np.log2(n) * 1e-6 + 2 * (n - 1) / n * SIZE / 1e10)


def test_halving_doubling_over_nodes_pays_each_round_in_turn():
    cost = collective(fabric(2, 2, nics=1), AR, range(4), SIZE, algorithm="halving-doubling")
    assert cost.time_s == pytest.approx(LAUNCH_LATENCY_S + 2 * (1e-6 + 1e-5) + 2 * (SIZE / 2 / 1e10 + 2 * SIZE / 4 / 1e9))


@pytest.mark.parametrize(("nodes", "inside"), [(2, 8), (4, 4), (16, 8)])
def test_hierarchical_is_its_three_parts(nodes, inside):
    cost = collective(fabric(nodes, inside), AR, range(nodes * inside), SIZE, algorithm="hierarchical")
    within = (inside - 1) / inside * SIZE / 1e10
    between = 2 * (nodes - 1) / nodes * SIZE / inside / 1e9
    latency_s = LAUNCH_LATENCY_S + 2 * (inside - 1) * 1e-6 + 2 * (nodes - 1) * 1e-5
    assert cost.time_s == pytest.approx(latency_s + 2 * within + between)


def test_switches_that_add_up_send_each_byte_about_once():
    f = fabric(1, 8, peer_reduction=True)
    cost = collective(f, AR, range(8), SIZE, algorithm="in-network")
    assert seconds(cost) == pytest.approx((1 + 1 / 8) * SIZE / 1e10 / SWITCH_BANDWIDTH_SHARE)
    many = fabric(4, 8, network=Network(in_network_reduction=True))
    assert seconds(collective(many, AR, range(32), SIZE, algorithm="in-network")) == pytest.approx(max(2 * 7 / 8 / 1e10, 1 / 8e9) * SIZE)


def test_ring_latency_is_one_way_around_not_the_slowest_hop_at_every_step():
    cost = collective(fabric(4, 8), AG, range(32), 0.0, algorithm="ring")
    assert cost.time_s == pytest.approx(LAUNCH_LATENCY_S + 27 * 1e-6 + 4 * 1e-5)


# ASTRA-sim 2.0 (analytical, congestion-unaware), 1 GiB ring all-reduce; "50 GB/s" means 50 x 2^30 bytes/s there, latency 500 ns.


@pytest.mark.parametrize(
    ("n", "simulated_ns"),
    [(8, 36_768_621), (16, 39_402_466), (64, 41_419_792), (256, 42_104_326), (1024, 42_995_668), (4096, 46_089_226)],
)
def test_astra_sim_ring(n, simulated_ns):
    link = Link("link", 50 * 2**30, 1.0, 500e-9)
    f = Fabric(Cluster("ring", (Node((st.device("h100-sxm"),) * n, None, HOST, link),)))
    cost = collective(f, AR, range(n), 2**30, algorithm="ring")
    # It counts whole nanoseconds per step, three passes through memory at 1600e9 bytes/s per reducing step, and 1 ns of delay per message;
    # we count none of these (memory is another room's matter), so they are added here.
    # Its network has one protocol, ours changes protocols with the size.
    ramp_s = (RAMP_S + SIMPLE_HOPS * 2 * (n - 1) * 500e-9) * 2**30 / (2**30 + RAMP_BYTES)
    memory_ns = (n - 1) * 3 * int(2**30 / n / 1600)
    ours_ns = (cost.time_s - LAUNCH_LATENCY_S - ramp_s) * 1e9 + memory_ns + (2 * n - 1)
    assert simulated_ns == pytest.approx(ours_ns, abs=2 * (n - 1))


# Conservation and bounds.

FABRICS = {
    "switch": fabric(1, 8, peer_reduction=True),
    "mesh": fabric(1, 8, peer_shape="mesh"),
    "nodes": fabric(4, 4, network=Network(in_network_reduction=True)),
    "fat tree": fabric(8, 2, network=Network("fat-tree", 2, 2.0)),
    "rails": fabric(8, 4, network=Network("rail-optimized", 4, 2.0)),
    "dragonfly": fabric(8, 2, network=Network("dragonfly", 2)),
    "torus": torus(4, 4),
    "mesh of chips": torus(4, 4, wraparound=(False, False)),
}


def all_costs(f, kind):
    for algorithm in ALGORITHMS[kind]:
        try:
            yield algorithm, collective(f, kind, range(f.cluster.size), SIZE, algorithm=algorithm)
        except UnsupportedError:
            continue


@pytest.mark.parametrize("name", FABRICS)
@pytest.mark.parametrize("kind", [AR, AG, RS, A2A, BC])
def test_what_is_sent_is_received(name, kind):
    for algorithm, cost in all_costs(FABRICS[name], kind):
        for out, into in ((" out", " in"), (" up", " down")):
            if "torus" in name or "chips" in name:
                break
            sent, received = (sum(v for r, v in cost.loads.items() if r.name.endswith(end)) for end in (out, into))
            assert sent == pytest.approx(received), algorithm


@pytest.mark.parametrize("name", FABRICS)
def test_reduce_scatter_and_all_gather_make_an_all_reduce(name):
    f, ranks = FABRICS[name], range(FABRICS[name].cluster.size)
    for algorithm in ("ring", "halving-doubling", "hierarchical", "torus"):
        try:
            whole = collective(f, AR, ranks, SIZE, algorithm=algorithm)
        except UnsupportedError:
            continue
        halves = [collective(f, kind, ranks, SIZE, algorithm=algorithm) for kind in (RS, AG)]
        for resource, amount in whole.loads.items():
            assert amount == pytest.approx(halves[0].loads[resource] + halves[1].loads[resource])


@pytest.mark.parametrize("name", FABRICS)
def test_no_algorithm_beats_the_lower_bounds(name):
    f = FABRICS[name]
    n = f.cluster.size
    # Most a rank can inject: its own links, all of them at once.
    own = 4 * 1e10 if "torus" in name or "chips" in name else 1e10
    for algorithm, cost in all_costs(f, AR):
        least = (n + 1) / n if algorithm == "in-network" else 2 * (n - 1) / n
        if algorithm != "in-network" or len(f.cluster.nodes) == 1:
            assert cost.time_s >= least * SIZE / own * (1 - 1e-9), algorithm
    for _, cost in all_costs(f, AG):
        assert cost.time_s >= (n - 1) / n * SIZE / own * (1 - 1e-9)


def test_exchanges_obey_the_bisection():
    f = fabric(8, 2, network=Network("fat-tree", 4, 4.0))
    crossing = 8 * 8 / 16 * SIZE  # each of 8 ranks sends 1/16 to each of 8 others across
    assert seconds(collective(f, A2A, range(16), SIZE)) == pytest.approx(crossing / (4 * 2 * 1e9 / 4))
    ring = torus(16)
    crossing_per_link = 8 * 8 / 16 * SIZE / 2  # the cut of a ring goes through two links each way
    assert collective(ring, A2A, range(16), SIZE).time_s >= crossing_per_link / 1e10


# Networks.


def test_groups_alone_use_their_rail_and_together_all_rails():
    f = fabric(4, 8)
    groups = [range(i, 32, 8) for i in range(8)]
    alone = collective(f, AR, groups[0], SIZE, algorithm="ring")
    together = collective(f, AR, groups[0], SIZE, concurrent=groups[1:], algorithm="ring")
    assert together.time_s == pytest.approx(alone.time_s)
    assert seconds(alone) == pytest.approx(2 * 3 / 4 * SIZE / 1e9)
    shared = fabric(4, 8, nics=2)
    assert seconds(collective(shared, AR, groups[0], SIZE, concurrent=groups[1:], algorithm="ring")) == pytest.approx(4 * seconds(alone))
    assert seconds(collective(shared, AR, groups[0], SIZE, concurrent=groups[4:], algorithm="ring")) == pytest.approx(seconds(alone))


def test_a_full_ring_over_nodes_uses_all_rails():
    assert seconds(collective(fabric(4, 8), AR, range(32), SIZE, algorithm="ring")) == pytest.approx(2 * 31 / 32 * SIZE / 8e9)


@pytest.mark.parametrize(("oversubscription", "slowdown"), [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (8.0, 2.0)])
def test_oversubscription_counts_when_a_leaf_is_full(oversubscription, slowdown):
    # A ring over nodes in order leaves each leaf of four nodes once: a quarter of the leaf's traffic.
    f = fabric(8, 1, network=Network("fat-tree", 4, oversubscription))
    assert seconds(collective(f, AR, range(8), SIZE, algorithm="ring")) == pytest.approx(slowdown * 2 * 7 / 8 * SIZE / 1e9)


def test_rails_keep_rings_off_the_spine_inside_a_pod():
    f = fabric(4, 8, network=Network("rail-optimized", 4, 100.0))
    assert not [r for r in collective(f, AR, range(32), SIZE, algorithm="ring").loads if "leaf" in r.name]
    crossing = point_to_point(f, 0, 9, SIZE)  # from rail 0 to rail 1
    assert [r.name for r in crossing.loads if "leaf" in r.name] == ["leaf of pod 0 rail 0 up", "leaf of pod 0 rail 1 down"]


def test_a_dragonfly_sends_a_pair_of_groups_over_one_link():
    f = fabric(8, 1, network=Network("dragonfly", 2))
    assert seconds(point_to_point(f, 0, 2, SIZE)) == pytest.approx(SIZE / min(1e9, 2e9 / 3))
    assert seconds(point_to_point(f, 0, 1, SIZE)) == pytest.approx(SIZE / 1e9)


def test_a_mesh_gives_collectives_its_full_rate_and_pairs_a_part():
    f = fabric(1, 4, peer_shape="mesh")
    assert seconds(collective(f, AR, range(4), SIZE, algorithm="ring")) == pytest.approx(2 * 3 / 4 * SIZE / 1e10)
    assert seconds(point_to_point(f, 0, 1, SIZE)) == pytest.approx(SIZE / (1e10 / 3))


def test_a_torus_reduces_over_all_axes_and_directions_at_once():
    assert seconds(collective(torus(8), AR, range(8), SIZE, algorithm="torus")) == pytest.approx(2 * 7 / 8 * SIZE / 2e10)
    square = collective(torus(8, 8), AR, range(64), SIZE, algorithm="torus")
    assert square.time_s == pytest.approx(LAUNCH_LATENCY_S + 4 * 7e-6 + 2 * 63 / 64 * SIZE / 4e10)
    cube = collective(torus(4, 4, 4), AR, range(64), SIZE, algorithm="torus")
    assert cube.time_s - cube.latency_s == pytest.approx(2 * 63 / 64 * SIZE / 6e10)


def test_wraparound_only_where_the_axis_is_whole():
    whole, half = torus(8), torus(16)
    inside = collective(half, AR, range(8), SIZE, algorithm="torus")
    open_axis = collective(torus(8, wraparound=(False,)), AR, range(8), SIZE, algorithm="torus")
    assert seconds(inside) == pytest.approx(2 * seconds(collective(whole, AR, range(8), SIZE, algorithm="torus")), rel=0.2)
    assert seconds(open_axis) == pytest.approx(2 * 7 / 8 * SIZE / 1e10)


def test_an_exchange_on_a_torus_matches_its_messages_one_by_one():
    f = torus(4, 4)
    by_axis, direct = (collective(f, A2A, range(16), SIZE, algorithm=a) for a in ("torus", "direct"))
    assert seconds(by_axis) == pytest.approx(seconds(direct))


def test_devices_behind_one_host_switch_share_its_uplink():
    f = fabric(1, 4, peer_link=None, host_group=2)
    alone = seconds(point_to_point(f, 0, 2, SIZE))
    assert seconds(point_to_point(f, 0, 2, SIZE, concurrent=[(1, 3)])) == pytest.approx(2 * alone)


def test_point_to_point_is_latency_and_bytes():
    cost = point_to_point(fabric(2, 8), 0, 8, SIZE)
    assert cost.time_s == pytest.approx(LAUNCH_LATENCY_S + 1e-5 + SIZE / 1e9)


@pytest.mark.parametrize("name", FABRICS)
def test_best_is_at_least_as_fast_as_any(name):
    f = FABRICS[name]
    best = collective(f, AR, range(f.cluster.size), SIZE, algorithm="best").time_s
    assert best == pytest.approx(min(cost.time_s for _, cost in all_costs(f, AR)))


def test_trees_carry_two_buffers_at_their_share():
    cost = collective(fabric(8, 1), AR, range(8), SIZE, algorithm="tree")
    assert cost.time_s >= 2 * 7 / 8 * SIZE / 1e9 / TREE_BANDWIDTH_SHARE


@pytest.mark.parametrize("name", FABRICS)
@pytest.mark.parametrize("kind", [AR, A2A])
def test_groups_without_a_common_domain_share_nothing(name, kind):
    f = FABRICS[name]
    half = f.cluster.size // 2
    first, second = range(half), range(half, 2 * half)
    if not set(f.domain_of[list(first)]) & set(f.domain_of[list(second)]):
        assert not collective(f, kind, first, SIZE).loads.keys() & collective(f, kind, second, SIZE).loads.keys()
    together = collective(f, kind, first, SIZE, concurrent=[second])
    assert together.time_s >= collective(f, kind, first, SIZE).time_s * (1 - 1e-9)


# Refusals name field and fix.


def test_refusals():
    with pytest.raises(InputError, match="ranks 0 to 7"):
        collective(fabric(1, 8), AR, range(9), SIZE)
    with pytest.raises(UnknownNameError, match="did you mean 'ring'"):
        collective(fabric(1, 8), AR, range(8), SIZE, algorithm="rng")
    with pytest.raises(UnsupportedError, match="all-gather has no algorithm 'tree'"):
        collective(fabric(1, 8), AG, range(8), SIZE, algorithm="tree")
    with pytest.raises(UnsupportedError, match="power of two"):
        collective(fabric(1, 6), AR, range(6), SIZE, algorithm="halving-doubling")
    with pytest.raises(UnsupportedError, match="peer_reduction"):
        collective(fabric(1, 8), AR, range(8), SIZE, algorithm="in-network")
    with pytest.raises(InputError, match=r"4 x 4 make 16 vertices.*multiply to 8"):
        fabric(8, 1, network=Network("torus", dimensions=(4, 4)))
    with pytest.raises(InputError, match="bandwidth must be positive"):
        Link("wire", 0.0, 1.0, 0.0)
    with pytest.raises(InputError, match="peer_link"):
        fabric(2, 1, peer_link=None, network=Network("torus", dimensions=(2,))).topology  # noqa: B018
    with pytest.raises(InputError, match="as large as"):
        collective(fabric(1, 8), AR, range(4), SIZE, concurrent=[range(4, 7)])
