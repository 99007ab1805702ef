"""What offloading leaves on a device, and what it takes of host memory and drives.

On the device stay the weights (2 bytes of 16 per parameter in 16 bit, ZeRO-Offload), or, where these move too, those of the layers at work,
and staging buffers: two for each direction, as large as the largest layer that passes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.result import MemoryKind
from simtrain.core.units import format_bytes
from simtrain.step.layout import Lane, Layout
from simtrain.step.occupancy import BLOCK_BYTES, COLUMN
from simtrain.step.offload import STAGING_BUFFERS, Sizes, held_elements, largest_layer
from simtrain.step.offload_activations import moved_items
from simtrain.step.schedules import in_flight
from simtrain.step.setting import Setting
from simtrain.step.states import fully_sharded, shards


def left_on_device(setting: Setting, lane: Lane, row: FloatArray) -> FloatArray:
    """What is there all the time on a device, less what lives on the host.

    Args:
        setting: The question.
        lane: Which ranks.
        row: The same if nothing moved.
    """
    moved = setting.strategy.moved
    if not moved.optimizer:
        return row
    row = row.copy()
    sizes, staged = Sizes.of(setting), largest_layer(setting, lane)
    row[COLUMN[MemoryKind.OPTIMIZER]] = 0.0
    spread = shards(setting) if fully_sharded(setting) else 1
    weights = np.array([p.elements / spread * sizes.weight for chunk in lane.chunks for p in chunk.parameters])
    buffers = sum(x.buffer_bytes for chunk in lane.chunks for x in chunk.workload)
    stay = not moved.parameters
    row[COLUMN[MemoryKind.PARAMETER]] = stay * float(weights.sum()) + buffers
    row[COLUMN[MemoryKind.ROUNDING]] = stay * (
        float((-weights % BLOCK_BYTES).sum()) if setting.runtime.memory.allocator == "caching" else 0.0
    )
    staging = COLUMN[MemoryKind.COMMUNICATION]
    if moved.gradients:
        row[COLUMN[MemoryKind.GRADIENT]] = 0.0
        again = setting.strategy.accumulation > 1  # what was added up before comes back to be added to
        row[staging] += (1 + again) * STAGING_BUFFERS * staged * sizes.gradient
    elif setting.precision.master is not None and not setting.runtime.update.main_gradients and setting.strategy.zero < 2:
        # gradients in the master's format are made where the master is
        row[COLUMN[MemoryKind.GRADIENT]] -= _trained(lane) * setting.precision.state.size_bytes / shards(setting)
    if moved.parameters and spread > 1:
        row[staging] += STAGING_BUFFERS * staged * sizes.weight
    return row


def _trained(lane: Lane) -> float:
    return sum(p.elements for chunk in lane.chunks for p in chunk.trained)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What the fullest node keeps outside its devices.

    Attributes:
        host_bytes: In host memory, pinned buffers among them.
        host_capacity_bytes: What the node has of it; 0 where that is not known.
        nvme_bytes: On drives.
        nvme_capacity_bytes: What it has of them.
    """

    host_bytes: float = 0.0
    host_capacity_bytes: float = 0.0
    nvme_bytes: float = 0.0
    nvme_capacity_bytes: float = 0.0


def host_memory(layout: Layout) -> HostMemory:
    """Adds up what the ranks of each node keep there; of the node that is fullest against what it has."""
    if not layout.setting.strategy.moved.anything:
        return HostMemory()
    by_node: dict[int, tuple[float, float]] = {}
    flying = in_flight(layout.plan).forward
    for lane in layout.lanes:
        own = _rank_bytes(layout.setting, lane, int(flying[lane.stage]))
        for rank in lane.rank_class.ranks:
            node = layout.fabric.places[rank][0]
            host, nvme = by_node.get(node, (0.0, 0.0))
            by_node[node] = (host + own[0], nvme + own[1])
    nodes = layout.setting.cluster.nodes
    found = []
    for node, (host, nvme) in by_node.items():
        storage = nodes[node].storage
        found.append(HostMemory(host, nodes[node].host_memory_bytes, nvme, storage.capacity_bytes if storage else 0.0))
    return max(found, key=lambda m: max(m.host_bytes - m.host_capacity_bytes, m.nvme_bytes - m.nvme_capacity_bytes))


def _rank_bytes(setting: Setting, lane: Lane, micro_batches: int = 1) -> tuple[float, float]:
    """What one rank of a lane keeps in host memory and on drives, with so many micro-batches between forward and backward."""
    moved, sizes = setting.strategy.moved, Sizes.of(setting)
    trained, staged = held_elements(setting, lane, trained=True), largest_layer(setting, lane)
    items = moved_items(setting, lane)
    kept = [
        (moved.optimizer, trained * sizes.state, staged * sizes.state),
        (moved.gradients, (1 + moved.delayed) * trained * sizes.gradient, staged * sizes.gradient),
        (moved.parameters, held_elements(setting, lane, trained=False) * sizes.weight, staged * sizes.weight),
        (moved.activations, micro_batches * sum(i.size_bytes for i in items), max((i.size_bytes for i in items), default=0.0)),
    ]
    total = {"host": 0.0, "nvme": 0.0}
    for tier, size, largest in kept:
        if tier:
            total[tier] += size
            total["host"] += STAGING_BUFFERS * largest if tier == "nvme" else 0.0
    if moved.optimizer:  # what passes to and from the device, pinned
        total["host"] += 2 * STAGING_BUFFERS * staged * sizes.weight
    return total["host"], total["nvme"]


def shortage(memory: HostMemory) -> Sequence[str]:
    """Says what a host or its drives lack, and what would help."""
    lines = []
    if memory.host_bytes > memory.host_capacity_bytes:
        lines.append(
            f"out of memory on the host: a node would keep {format_bytes(memory.host_bytes)} in the "
            f"{format_bytes(memory.host_capacity_bytes)} that it has: move to nvme (offload=optimizer:nvme+...), shard over more nodes "
            "(zero), or move less"
        )
    if memory.nvme_bytes > memory.nvme_capacity_bytes:
        lines.append(
            f"out of room on the drives: a node would keep {format_bytes(memory.nvme_bytes)} on the "
            f"{format_bytes(memory.nvme_capacity_bytes)} that it has: shard over more nodes (zero), or move less"
        )
    return lines


__all__ = ["HostMemory", "host_memory", "left_on_device", "shortage"]
