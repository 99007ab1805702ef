"""Reading clusters that people type: `"4x rtx-3090"`, `"8x a100-sxm-80g + 4x v100-sxm-32g"`."""

from __future__ import annotations

import re

from simtrain.core import catalog
from simtrain.core.errors import InputError, UnknownNameError, nearest
from simtrain.core.hardware import Cluster, Device, Node

DEVICES_PER_NODE = 8
DEFAULT_NIC = "infiniband-hdr"
MAX_DEVICES = 1_000_000

_GROUP = re.compile(r"^(?:(\d+)\s*[x×*]\s*)?(.+)$")


def parse_cluster(text: str) -> Cluster:
    """Builds a cluster from counted device names, eight devices to a node, each kind on nodes of its own.

    What the text does not say (links, hosts, network) is taken from the devices' usual surroundings and listed in `assumptions`.

    Raises:
        InputError: Empty, or a count below one or beyond `MAX_DEVICES`.
        UnknownNameError: A device that no catalog holds.
    """
    nodes: list[Node] = []
    assumptions: list[str] = []
    for part in text.split("+"):
        match = _GROUP.match(part.strip())
        if match is None:
            raise InputError(f"cannot read the cluster {text!r}: expected a preset or devices such as '8x a100-sxm-80g'")
        count = int(match.group(1) or 1)
        if not 1 <= count <= MAX_DEVICES:
            raise InputError(f"{part.strip()!r}: the number of devices must be between 1 and {MAX_DEVICES}")
        nodes += _nodes(_device(match.group(2), text), count, assumptions)
    if len(nodes) > 1:
        nic = catalog.link(DEFAULT_NIC)
        assumptions.append(f"nodes are connected by one {nic.name} port per device (not stated)")
        nodes = [Node(n.devices, n.host, n.host_link, n.peer_link, n.peer_group, nic, len(n.devices)) for n in nodes]
    return Cluster(name=text.strip(), nodes=tuple(nodes), assumptions=tuple(dict.fromkeys(assumptions)), host_power_w=0.0)


def _device(name: str, text: str) -> Device:
    try:
        return catalog.device(name)
    except UnknownNameError as error:
        presets = nearest(text, catalog.names("clusters"))
        if presets and not error.suggestions:
            raise UnknownNameError("cluster", text, catalog.names("clusters")) from None
        raise


def _nodes(device: Device, count: int, assumptions: list[str]) -> list[Node]:
    host_link = catalog.link(device.host_link)
    peer_link = catalog.link(device.peer_link) if device.peer_link else None
    group = 2 if device.peer_link and "bridge" in device.peer_link else 0
    assumptions.append(f"{device.name}: up to {DEVICES_PER_NODE} per node, each on {host_link.name}; host power and price not counted")
    if peer_link is None:
        assumptions.append(f"{device.name}: no peer link, traffic between devices goes through host memory")
    sizes = [DEVICES_PER_NODE] * (count // DEVICES_PER_NODE) + ([count % DEVICES_PER_NODE] if count % DEVICES_PER_NODE else [])
    return [Node((device,) * size, None, host_link, peer_link, group) for size in sizes]
