"""The fabric as shared resources: which directed links a message between two ranks loads.

A resource is one direction of one device's link, a node's network ports, or a node's host memory. Traffic between devices without a
peer link is staged in host memory: it is written there and read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from simtrain.core.errors import InputError
from simtrain.core.hardware import Cluster, Link, Node
from simtrain.core.program import Resource

HOST_MEMORY_SHARE = 0.8
"""Share of the peak of host memory that transfers through it sustain (assumption: what STREAM reaches on desktop processors)."""


@dataclass(frozen=True)
class Fabric:
    """Routes between the ranks of a cluster.

    Attributes:
        cluster: Whose ranks.
    """

    cluster: Cluster

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Node and position in the node of each rank."""
        return tuple((n, i) for n, node in enumerate(self.cluster.nodes) for i in range(len(node.devices)))

    def hop(self, source: int, target: int) -> tuple[dict[Resource, float], float]:
        """Returns the resources that one byte from a rank to another loads (bytes each), and the latency of a message.

        Raises:
            InputError: The ranks' nodes are not connected.
        """
        (a, i), (b, j) = self.places[source], self.places[target]
        node = self.cluster.nodes[a]
        if a == b and _are_peers(node, i, j):
            peer = node.peer_link
            if peer is None:
                raise InputError(f"node {a} has no peer link")
            return {
                Resource(f"rank {source} peer out", peer.sustained_bytes_per_s): 1.0,
                Resource(f"rank {target} peer in", peer.sustained_bytes_per_s): 1.0,
            }, peer.latency_s
        if a == b:
            return self._through_host(a, source, target), node.host_link.latency_s
        return self._between_nodes(a, b), max(x.latency_s for x in self._nics(a, b))

    def _through_host(self, a: int, source: int, target: int) -> dict[Resource, float]:
        node = self.cluster.nodes[a]
        rate = node.host_link.sustained_bytes_per_s
        loads = {Resource(f"rank {source} host link out", rate): 1.0, Resource(f"rank {target} host link in", rate): 1.0}
        if node.host is not None:
            sustained = node.host.memory.bandwidth_bytes_per_s * HOST_MEMORY_SHARE
            loads[Resource(f"node {a} host memory", sustained)] = 2.0
        return loads

    def _between_nodes(self, a: int, b: int) -> dict[Resource, float]:
        """Traffic between nodes is spread over rails: as many rings as ports, each leaving through a device of its own."""
        out_nic, in_nic = self._nics(a, b)
        node, other = self.cluster.nodes[a], self.cluster.nodes[b]
        loads: dict[Resource, float] = {
            Resource(f"node {a} network out", out_nic.sustained_bytes_per_s * node.nics): 1.0,
            Resource(f"node {b} network in", in_nic.sustained_bytes_per_s * other.nics): 1.0,
        }
        for n, machine, direction in ((a, node, "out"), (b, other, "in")):
            rails = min(machine.nics, len(machine.devices))
            for rank in range(self.first_rank(n), self.first_rank(n) + rails):
                loads[Resource(f"rank {rank} host link {direction}", machine.host_link.sustained_bytes_per_s)] = 1.0 / rails
        return loads

    def _nics(self, a: int, b: int) -> tuple[Link, Link]:
        out_nic, in_nic = self.cluster.nodes[a].nic, self.cluster.nodes[b].nic
        if out_nic is None or in_nic is None:
            raise InputError(f"nodes {a} and {b} of cluster {self.cluster.name!r} have no network link: give the nodes a `nic`")
        return out_nic, in_nic

    def first_rank(self, node: int) -> int:
        """The first rank on a node."""
        return sum(len(n.devices) for n in self.cluster.nodes[:node])


def _are_peers(node: Node, i: int, j: int) -> bool:
    if node.peer_link is None:
        return False
    return node.peer_group == 0 or i // node.peer_group == j // node.peer_group
