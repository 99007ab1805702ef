"""Collectives against their closed forms, and conservation of what is sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import InputError
from simtrain.core.hardware import Cluster, Link, Node
from simtrain.cost.algorithms import LAUNCH_LATENCY_S, RAMP_S, SIMPLE_HOPS, TREE_BANDWIDTH_SHARE
from simtrain.cost.collectives import RAMP_BYTES, all_gather, all_reduce
from simtrain.cost.fabric import HOST_MEMORY_SHARE, Fabric


def switched(n: int, rate: float = 1e9, latency_s: float = 1e-6) -> Fabric:
    """n devices on a switch."""
    link = Link("test", rate, 1.0, latency_s)
    device = st.device("rtx-3090")
    return Fabric(Cluster("test", (Node((device,) * n, None, link, link),)))


@given(n=some.integers(2, 40), size=some.floats(1.0, 1e12))
def test_ring_all_reduce_closed_form(n, size):
    cost = all_reduce(switched(n), range(n), size, "ring")
    ramp_s = (RAMP_S + SIMPLE_HOPS * 2 * (n - 1) * 1e-6) * size / (size + RAMP_BYTES)
    assert cost.time_s == pytest.approx(LAUNCH_LATENCY_S + 2 * (n - 1) * 1e-6 + ramp_s + 2 * (n - 1) / n * size / 1e9)


@given(n=some.integers(2, 40), size=some.floats(1.0, 1e12))
def test_all_gather_is_half_an_all_reduce(n, size):
    whole = all_reduce(switched(n), range(n), size, "ring")
    half = all_gather(switched(n), range(n), size)
    for resource, amount in half.loads.items():
        assert 2 * amount == pytest.approx(whole.loads[resource])


@given(n=some.integers(2, 40), algorithm=some.sampled_from(["ring", "tree"]))
def test_what_is_sent_is_received(n, algorithm):
    loads = all_reduce(switched(n), range(n), 1e6, algorithm).loads
    sent = sum(v for r, v in loads.items() if r.name.endswith("out"))
    received = sum(v for r, v in loads.items() if r.name.endswith("in"))
    assert sent == pytest.approx(received)
    share = TREE_BANDWIDTH_SHARE if algorithm == "tree" else 1.0
    assert sent * share == pytest.approx(2 * (n - 1) * 1e6)  # no algorithm can send less in all


def test_trees_win_when_latency_counts_and_rings_when_bandwidth_does():
    fabric = switched(32)
    assert all_reduce(fabric, range(32), 1e3).algorithm == "tree"
    assert all_reduce(fabric, range(32), 1e9).algorithm == "ring"


def test_traffic_through_the_host_is_written_and_read_there():
    fabric = Fabric(st.cluster("4x rtx-3090"))
    loads = all_reduce(fabric, range(4), 1e9, "ring").loads
    memory = next(v for r, v in loads.items() if "host memory" in r.name)
    assert memory == pytest.approx(4 * 2 * 1.5e9)
    slowest = max(1.5e9 / st.link("pcie4-x4").sustained_bytes_per_s, 12e9 / (51.2e9 * HOST_MEMORY_SHARE))
    assert all_reduce(fabric, range(4), 1e9, "ring").time_s == pytest.approx(slowest, rel=0.01)


def test_bridges_join_pairs_only():
    fabric = Fabric(st.cluster("box-4x-rtx3090-nvlink"))
    inside, across = fabric.hop(0, 1)[0], fabric.hop(1, 2)[0]
    assert all("peer" in r.name for r in inside)
    assert any("host link" in r.name for r in across)


def test_one_rank_has_nothing_to_say():
    assert all_reduce(switched(1), [0], 1e9).time_s == 0


def test_nodes_without_a_network_are_refused():
    link = Link("test", 1e9, 1.0, 1e-6)
    lone = Node((st.device("rtx-3090"),), None, link)
    with pytest.raises(InputError, match="no network link"):
        all_reduce(Fabric(Cluster("islands", (lone, lone))), range(2), 1e6)


@pytest.mark.parametrize(("ranks", "size"), [([0, 0], 1.0), ([0, 1], -1.0), ([0, 1], float("nan"))])
def test_bad_collectives_are_refused(ranks, size):
    with pytest.raises(InputError):
        all_reduce(switched(4), ranks, size)


def nodes(count: int, per_node: int, nics: int) -> Fabric:
    """Nodes of switched devices; links of 1 GB/s inside, 0.1 GB/s per port between, host links of 10 GB/s."""
    inside, between, host = Link("inside", 1e9, 1.0, 1e-6), Link("between", 1e8, 1.0, 1e-5), Link("host", 1e10, 1.0, 1e-6)
    node = Node((st.device("h100-sxm"),) * per_node, None, host, inside, 0, between, nics)
    return Fabric(Cluster("test", (node,) * count))


@pytest.mark.parametrize("nics", [1, 4, 8])
def test_a_ring_over_nodes_uses_every_port(nics):
    cost = all_reduce(nodes(4, 8, nics), range(32), 1e9, "ring")
    assert cost.time_s == pytest.approx(2 * 31 / 32 * 1e9 / (nics * 1e8), rel=0.01)


def test_host_links_bind_only_when_they_are_slower_than_the_ports():
    link, fast = Link("slow host", 1e7, 1.0, 1e-6), Link("port", 1e8, 1.0, 1e-5)
    node = Node((st.device("h100-sxm"),) * 8, None, link, Link("inside", 1e9, 1.0, 1e-6), 0, fast, 8)
    cost = all_reduce(Fabric(Cluster("test", (node,) * 2)), range(16), 1e9, "ring")
    assert cost.time_s == pytest.approx(2 * 15 / 16 * 1e9 / 8 / 1e7, rel=0.01)


def test_trees_over_many_nodes_need_fewer_steps():
    fabric = nodes(64, 8, 8)
    ring, tree = (all_reduce(fabric, range(512), 1.0, algorithm) for algorithm in ("ring", "tree"))
    assert ring.latency_s == pytest.approx(LAUNCH_LATENCY_S + 2 * (64 * 1e-5 + 448 * 1e-6) - 2e-6, rel=1e-5)  # twice around, less two hops
    assert tree.latency_s == pytest.approx(LAUNCH_LATENCY_S + 2 * (7 * 1e-6 + 6 * 1e-5), rel=1e-5)


def test_large_messages_pay_the_latencies_of_the_simple_protocol_on_trees():
    fabric = nodes(2, 8, 8)
    small, large = (all_reduce(fabric, range(16), size, "tree").latency_s for size in (1.0, 2.0**40))
    assert small == pytest.approx(LAUNCH_LATENCY_S + 2 * (7e-6 + 1e-5), rel=1e-4)
    assert large == pytest.approx(LAUNCH_LATENCY_S + 2 * (7 * 28e-6 + 50e-6), rel=1e-4)  # NCCL's table: 28 us inside, 50 us between


def test_a_tree_crosses_each_node_boundary_once_each_way():
    loads = all_reduce(nodes(2, 8, 1), range(16), 1e6, "tree").loads
    crossing = sum(v for r, v in loads.items() if "network out" in r.name)
    assert crossing * TREE_BANDWIDTH_SHARE == pytest.approx(2 * 1e6)
