"""Which algorithm a communication library takes: the latency and bandwidth table of NCCL's own tuner.

The tuner predicts a time for every algorithm and protocol from a table and takes the least; what that choice then takes on a fabric is
priced elsewhere (`cost/collectives.py`). Version: NCCL's `src/graph/tuning.cc` of the Ampere generation, with the reductions in switches
of the Hopper generation; newer releases have other constants and the PAT algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["ring", "tree"]
Protocol = Literal["LL", "LL128", "Simple"]
Hop = Literal["nvlink", "pcie", "network"]

PROTOCOLS: tuple[Protocol, ...] = ("LL", "LL128", "Simple")

BASE_US: Mapping[Algorithm, tuple[float, float, float]] = {"tree": (4.4, 4.4, 0.0), "ring": (3.6, 10.0, 8.4)}
"""Fixed latency by protocol, microseconds."""

HOP_US: Mapping[Hop, Mapping[Algorithm, tuple[float, float, float]]] = {
    "nvlink": {"tree": (0.52, 1.2, 28.0), "ring": (0.47, 1.9, 3.4)},
    "pcie": {"tree": (1.0, 1.9, 28.0), "ring": (1.0, 2.5, 5.7)},
    "network": {"tree": (5.0, 8.5, 50.0), "ring": (2.7, 4.0, 9.6)},
}
"""Latency of a hop by protocol, microseconds."""

LL_FACTOR_BETWEEN_NODES = 1.8
"""On the latency of LL hops inside nodes, when there are several nodes."""

RATE_SHARE: Mapping[Algorithm, tuple[float, float, float]] = {"ring": (1 / 4, 0.92, 1.0), "tree": (1 / 3.8, 0.92, 1.0)}
"""Share of an algorithm's rate by protocol. LL128 trees: as rings (assumption)."""

SWITCH_US = 25.0
"""Latency of a reduction in NVLink switches (NVLS), microseconds, as third-party notes quote NCCL's tuner (not read in NCCL itself)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the tuner knows of a group.

    Attributes:
        ranks: How many.
        nodes: On how many nodes.
        inside: What connects ranks of a node.
        seconds_per_byte: Time that each byte of the buffer adds, by algorithm: "ring", "tree", and "in-network" where switches add up.
            NCCL's search of the topology finds the rates that these follow from.
    """

    ranks: int
    nodes: int
    inside: Literal["nvlink", "pcie"]
    seconds_per_byte: Mapping[str, float]


def latency_s(shape: Shape, algorithm: Algorithm, protocol: Protocol) -> float:
    """Latency of an all-reduce, as the tuner's table has it.

    A ring takes `2 (ranks - 1)` steps, `2 (nodes - 1)` of them over the network; a tree goes twice through the chain of a node and the
    levels between nodes.
    """
    column = PROTOCOLS.index(protocol)
    inside = HOP_US[shape.inside][algorithm][column]
    between = HOP_US["network"][algorithm][column]
    if protocol == "LL" and shape.nodes > 1:
        inside *= LL_FACTOR_BETWEEN_NODES
    if algorithm == "ring":
        steps, across = 2 * (shape.ranks - 1), 2 * (shape.nodes - 1)
        hops_us = (steps - across) * inside + across * between
    else:
        hops_us = 2 * ((shape.ranks / shape.nodes - 1) * inside + math.log2(shape.nodes) * between)
    return (BASE_US[algorithm][column] + hops_us) * 1e-6


def times_s(shape: Shape, size_bytes: float) -> dict[tuple[str, str], float]:
    """Times of an all-reduce that the tuner expects, by algorithm and protocol.

    Inside one node NCCL's tree is a chain, which takes as many hops as a ring: only rings compete there.
    """
    found: dict[tuple[str, str], float] = {}
    algorithms: tuple[Algorithm, ...] = ("ring", "tree") if shape.nodes > 1 else ("ring",)
    for algorithm in algorithms:
        for column, protocol in enumerate(PROTOCOLS):
            per_byte_s = shape.seconds_per_byte[algorithm] / RATE_SHARE[algorithm][column]
            found[algorithm, protocol] = latency_s(shape, algorithm, protocol) + size_bytes * per_byte_s
    if "in-network" in shape.seconds_per_byte:
        found["in-network", "Simple"] = SWITCH_US * 1e-6 + size_bytes * shape.seconds_per_byte["in-network"]
    return found


def choose(shape: Shape, size_bytes: float) -> str:
    """Returns the algorithm that the tuner takes for an all-reduce of this size."""
    expected = times_s(shape, size_bytes)
    return min(expected, key=lambda pair: expected[pair])[0]
