"""What the host's side of a machine costs: copies between devices and host memory or drives, and an optimizer that runs on the host.

A copy loads one direction of the device's link, the uplink of the PCIe switch that it shares with neighbours, and host memory; a copy to
or from drives passes through pinned buffers in host memory in pieces, so that it loads all of these and the drives at once and takes as
long as the slowest of them. Ranks of a node that do the same at the same time load what they share together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simtrain.core.errors import UnsupportedError
from simtrain.core.hardware import Storage
from simtrain.core.program import Resource
from simtrain.cost.collectives import CollectiveCost
from simtrain.cost.fabric import HOST_MEMORY_SHARE, Fabric

HOST_ADAM_SHARE = 0.43
"""Share of the peak of host memory that an optimizer on the host reaches."""

HOST_ADAM_SOURCE = (
    "optimizers on the host reach 43 % of the peak of host memory: 2.57 s for 10 billion parameters at 28 bytes each on two processors "
    "with 256 GB/s together (ZeRO-Offload, arXiv 2101.06840, table 4, as a summary of it quotes; the machine recalled, not looked up); "
    "taken for all hosts (assumption). That memory binds was measured on two cores of a server: PyTorch's fused AdamW moves 43 GB/s at 28 "
    "bytes per parameter, a triad 38 GB/s with the lines that it loads to write; tensor by tensor AdamW takes 5.9 times as long"
)


def host_copy(fabric: Fabric, ranks: Sequence[int], size_bytes: float, *, out: bool, drives: bool = False) -> CollectiveCost:
    """Prices a copy that each of some ranks makes at the same time.

    Args:
        fabric: Where they stand.
        ranks: Who copies.
        size_bytes: How much each of them.
        out: Whether away from the device.
        drives: Whether to or from drives, rather than host memory.

    Raises:
        UnsupportedError: The node has no drives, or its host is not known.
    """
    rank, together = _crowded(fabric, ranks)
    node_number = fabric.places[rank][0]
    node = fabric.cluster.nodes[node_number]
    direction = "out" if out else "in"
    loads = {_one(fabric, f"host {direction}", rank): size_bytes}
    shared, first = fabric.host_switches
    if shared[rank]:
        beside = sum(1 for r in together if first[r] == first[rank])
        loads[_one(fabric, f"uplink {direction}", int(first[rank]))] = size_bytes * beside
    loads[_host_memory(fabric, node_number)] = size_bytes * len(together) * (2 if drives else 1)
    if drives:
        loads[_drives(fabric, node_number, reads=not out)] = size_bytes * len(together)
    return CollectiveCost("copy", node.host_link.latency_s, loads)


def drive_copy(fabric: Fabric, ranks: Sequence[int], size_bytes: float, *, reads: bool) -> CollectiveCost:
    """Prices a copy between host memory and drives, made for each of some ranks at the same time.

    Args:
        fabric: Where they stand.
        ranks: For whom.
        size_bytes: How much each.
        reads: Whether from drives.

    Raises:
        UnsupportedError: The node has no drives, or its host is not known.
    """
    rank, together = _crowded(fabric, ranks)
    node = fabric.places[rank][0]
    amount = size_bytes * len(together)
    return CollectiveCost("copy", 0.0, {_drives(fabric, node, reads=reads): amount, _host_memory(fabric, node): amount})


def host_update(fabric: Fabric, ranks: Sequence[int], traffic_bytes: float) -> CollectiveCost:
    """Prices an update on the host, made for each of some ranks at the same time.

    Args:
        fabric: Where they stand.
        ranks: For whom.
        traffic_bytes: What an update reads and writes in host memory for one rank.

    Raises:
        UnsupportedError: The host is not known.
    """
    rank, together = _crowded(fabric, ranks)
    slowed = HOST_MEMORY_SHARE / HOST_ADAM_SHARE  # an update loads memory as long as a copy of so much more
    return CollectiveCost("update", 0.0, {_host_memory(fabric, fabric.places[rank][0]): traffic_bytes * len(together) * slowed})


def _crowded(fabric: Fabric, ranks: Sequence[int]) -> tuple[int, list[int]]:
    """The rank on the fullest of the switches, and all of the given ranks on its node."""
    first = fabric.host_switches[1]
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(int(fabric.node_of[rank]), []).append(rank)
    together = max(by_node.values(), key=len)
    switches = [int(first[r]) for r in together]
    return max(together, key=lambda r: switches.count(int(first[r]))), together


def _one(fabric: Fabric, block: str, index: int) -> Resource:
    return fabric.resources(np.array([fabric.blocks[block].start + index]))[0]


def _host_memory(fabric: Fabric, node: int) -> Resource:
    if fabric.cluster.nodes[node].host is None:
        raise UnsupportedError(
            f"offloading needs to know the host, which cluster {fabric.cluster.name!r} does not state: take a preset that does, such as "
            "dgx-2, dgx-a100, dgx-h100 or 4x rtx-3090, or give [[nodes]] of a cluster file a `host`"
        )
    return _one(fabric, "memory", node)


def _drives(fabric: Fabric, node: int, *, reads: bool) -> Resource:
    storage: Storage | None = fabric.cluster.nodes[node].storage
    if storage is None:
        raise UnsupportedError(
            f"offload to nvme: cluster {fabric.cluster.name!r} states no drives: offload to the host, or give the cluster file "
            "nvme_capacity, nvme_read and nvme_write"
        )
    rate = storage.read_bytes_per_s if reads else storage.write_bytes_per_s
    return Resource(f"node {node} drives {'read' if reads else 'write'}", rate)


__all__ = ["HOST_ADAM_SHARE", "HOST_ADAM_SOURCE", "drive_copy", "host_copy", "host_update"]
