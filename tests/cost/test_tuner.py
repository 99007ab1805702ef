"""NCCL's tuning table against totals worked out from its formula, and what follows from its choices."""

import pytest

import simtrain as st
from simtrain.cost.algorithms import TREE_BANDWIDTH_SHARE
from simtrain.cost.collectives import Collective, collective
from simtrain.cost.fabric import Fabric
from simtrain.cost.tuner import Shape, choose, latency_s


@pytest.mark.parametrize(
    ("ranks", "expected_us"),
    [(16, (33, 28, 123, 492)), (128, (274, 58, 1058, 792)), (512, (1102, 78, 4264, 992)), (4096, (8827, 108, 34191, 1292))],
)
def test_latencies_of_the_table(ranks, expected_us):
    shape = Shape(ranks, ranks // 8, "nvlink", {})
    pairs = (("ring", "LL"), ("tree", "LL"), ("ring", "Simple"), ("tree", "Simple"))
    assert [round(latency_s(shape, algorithm, protocol) * 1e6) for algorithm, protocol in pairs] == list(expected_us)


def test_large_messages_leave_rings_only_at_scale():
    rates = {"ring": 2e-11, "tree": 2e-11 / 0.9}
    assert choose(Shape(32, 4, "nvlink", rates), 1e9) == "ring"
    assert choose(Shape(4096, 512, "nvlink", rates), 1e8) == "tree"
    assert choose(Shape(32, 4, "nvlink", rates), 1e3) == "tree"


def test_between_two_nodes_a_tree_sends_half_of_what_a_ring_does():
    fabric = Fabric(st.cluster("2x dgx-a100"))
    ring, tree = (collective(fabric, Collective.ALL_REDUCE, range(16), 1e10, algorithm=a) for a in ("ring", "tree"))
    sent = [sum(v for r, v in cost.loads.items() if "network out" in r.name) for cost in (ring, tree)]
    assert sent[0] == pytest.approx(2 * 2 * 15 / 16 * 1e10)
    assert sent[1] * TREE_BANDWIDTH_SHARE == pytest.approx(2 * 1e10)
    assert collective(fabric, Collective.ALL_REDUCE, range(16), 1e10).algorithm == "tree"


def test_switches_that_add_up_are_used_for_large_messages():
    fabric = Fabric(st.cluster("dgx-h100"))
    assert collective(fabric, Collective.ALL_REDUCE, range(8), 1e9).algorithm == "in-network"
    assert collective(fabric, Collective.ALL_REDUCE, range(8), 1e4).algorithm in ("ring", "tree")
    assert collective(fabric, Collective.ALL_GATHER, range(8), 1e9).algorithm == "ring"


def test_a_cpu_box_does_not_ask_nccl():
    fabric = Fabric(st.cluster("4x cpu-core"))
    auto, default = (collective(fabric, Collective.ALL_REDUCE, range(4), 1e6, algorithm=a) for a in ("auto", None))
    assert default == auto
