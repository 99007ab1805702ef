"""Machines with more or less of one resource: what sensitivities and robust choices are asked with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from simtrain.core.hardware import Cluster, Device, Link
from simtrain.core.runtime import Runtime

RESOURCES = ("compute peak", "memory bandwidth", "link bandwidth", "host launch rate")
"""What there can be more or less of; links only with several devices, the host only where it issues work ahead of a device."""


def scaled(cluster: Cluster, runtime: Runtime, factor: float) -> Iterator[tuple[str, Cluster, Runtime]]:
    """The machines with one resource at a time multiplied.

    Args:
        cluster: As they are.
        runtime: What carries the step out; its host work is one of the resources.
        factor: 1.1 for 10 % more of it.

    Yields:
        The resource's name, and cluster and runtime with so much of it.
    """

    def faster(device: Device) -> Device:
        return replace(device, peak_flops={path: rate * factor for path, rate in device.peak_flops.items()})

    def wider(device: Device) -> Device:
        return replace(device, memory=replace(device.memory, bandwidth_bytes_per_s=device.memory.bandwidth_bytes_per_s * factor))

    yield RESOURCES[0], _with_devices(cluster, {d: faster(d) for d in set(cluster.devices)}), runtime
    yield RESOURCES[1], _with_devices(cluster, {d: wider(d) for d in set(cluster.devices)}), runtime
    if cluster.size > 1:
        yield RESOURCES[2], _with_links(cluster, factor), runtime
    if runtime.host.run_ahead_launches:
        yield RESOURCES[3], cluster, runtime.with_(launch_s=runtime.host.launch_s / factor, recompute_s=runtime.host.recompute_s / factor)


def _with_devices(cluster: Cluster, other: dict[Device, Device]) -> Cluster:
    nodes = tuple(replace(node, devices=tuple(other[d] for d in node.devices)) for node in cluster.nodes)
    return replace(cluster, nodes=nodes)


def _with_links(cluster: Cluster, factor: float) -> Cluster:
    def wider(link: Link) -> Link:
        return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor)

    def quicker(host: Device) -> Device:
        return replace(host, memory=replace(host.memory, bandwidth_bytes_per_s=host.memory.bandwidth_bytes_per_s * factor))

    nodes = tuple(
        replace(
            node,
            host=quicker(node.host) if node.host and node.host not in node.devices else node.host,  # traffic without a peer link crosses it
            host_link=wider(node.host_link),
            peer_link=wider(node.peer_link) if node.peer_link else None,
            nic=wider(node.nic) if node.nic else None,
        )
        for node in cluster.nodes
    )
    return replace(cluster, nodes=nodes)


__all__ = ["RESOURCES", "scaled"]
