"""Offloading: what a setting moves off the device, and how many bytes of it there are.

The update runs on the host and reads and writes there what ZeRO-Offload keeps there (Ren et al. 2021, arXiv 2101.06840): gradients, the
optimizer's state and master weights; weights go back to the device layer by layer as they are updated, or, where they live on the host
too, are fetched for every pass (ZeRO-Infinity, Rajbhandari et al. 2021, arXiv 2104.07857).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simtrain.core.strategy import OPTIMIZERS
from simtrain.core.units import format_time
from simtrain.cost.host import HOST_ADAM_SOURCE
from simtrain.step.layout import Lane
from simtrain.step.setting import Setting
from simtrain.step.shard import Chunk
from simtrain.step.states import fully_sharded, shards

STAGING_BUFFERS = 2
"""Buffers for each direction: one is filled while the other is emptied."""

HOST_STREAMS = {
    "to host": "copying to the host",
    "from host": "copying from the host",
    "drives read": "reading from drives",
    "drives write": "writing to drives",
    "host update": "the update on the host",
}
"""Streams of a rank that belong to offloading, with what they do in prose."""

FLOW = (
    "the update runs on the host once all gradients are there, layer by layer, and sends each layer's weights back while it goes on with "
    "the next; copies run beside computation through pinned, double buffers and slow it only by what waits for them"
)

LATE = (
    "the update of a step runs on the host beside the next step, and weights are sent when that has run backward, so that they are one "
    "step late; what this costs in quality is not modelled"
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes per trained parameter of what offloading moves.

    Attributes:
        gradient: Of a gradient, in the format of the weights (as ZeRO-Offload counts it; DeepSpeed's code sends fp32 instead).
        weight: Of a weight as the device holds it.
        state: Of the optimizer's state and master weight on the host.
        update: That an update reads and writes in host memory.
    """

    gradient: int
    weight: int
    state: int
    update: int

    @classmethod
    def of(cls, setting: Setting) -> Sizes:
        """Sizes of a setting."""
        precision = setting.precision
        gradient = weight = precision.parameter.size_bytes
        state = precision.state.size_bytes * (OPTIMIZERS[setting.strategy.optimizer] + 1)  # the copy that is updated is one of them
        cast = weight if precision.master is not None else 0
        return cls(gradient, weight, state, gradient + 2 * state + cast)


def layer_elements(setting: Setting, chunk: Chunk) -> list[tuple[int, float]]:
    """Layers with trained parameters in the order in which backward completes their gradients, with this rank's share of elements."""
    over = shards(setting)
    found = [(i, sum(p.elements for p in layer.trained) / over) for i, layer in enumerate(chunk.workload)]
    return [(i, n) for i, n in reversed(found) if n]


def held_elements(setting: Setting, lane: Lane, *, trained: bool) -> float:
    """Elements of the parameters that a rank answers for: all that it holds, or its shard of those that are trained."""
    if trained:
        return sum(p.elements for chunk in lane.chunks for p in chunk.trained) / shards(setting)
    spread = shards(setting) if fully_sharded(setting) else 1
    return sum(p.elements for chunk in lane.chunks for p in chunk.parameters) / spread


def largest_layer(setting: Setting, lane: Lane) -> float:
    """This rank's share of the trained elements of the largest layer, which staging buffers must hold."""
    return max((n for chunk in lane.chunks for _, n in layer_elements(setting, chunk)), default=0.0)


def offload_notes(setting: Setting, busy_s: Mapping[str, float]) -> list[str]:
    """What a result says about offloading, and whether it waits for links more than it computes.

    Args:
        setting: The question.
        busy_s: Seconds that each stream of the slowest rank is busy in a step.
    """
    moved = setting.strategy.moved
    if not moved.anything:
        return []
    notes = [LATE if moved.delayed else FLOW] if moved.optimizer else []
    if len(setting.devices) > 1 and any(node.peer_link is None and len(node.devices) > 1 for node in setting.cluster.nodes):
        notes.append(
            "copies to the host and collectives meet on the host links of devices without peer links: `simulate` lets them share, "
            "`estimate` and `schedule` do not and were up to 40 % faster"
        )
    computes = busy_s.get("compute", 0.0)
    slowest = max(HOST_STREAMS, key=lambda name: busy_s.get(name, 0.0))
    takes = busy_s.get(slowest, 0.0)
    if takes > computes > 0:
        fix = "move fewer blocks (checkpoint=optimal chooses)" if moved.activations else "more samples a step, or less moved, helps"
        notes.append(
            f"thrashing: {HOST_STREAMS[slowest]} takes {format_time(takes)} of every step, {takes / computes:.3g} times what the device "
            f"computes ({format_time(computes)}): {fix}"
        )
    return notes


def offload_sources(setting: Setting) -> list[str]:
    """What the costs of offloading rest on."""
    cluster = setting.cluster
    names = ("host.memory.capacity_bytes", "storage.read_bytes_per_s")
    lines = [f"{cluster.name}: {cluster.provenance[n].source}" for n in names if n in cluster.provenance]
    for node in {n.host_link.name: n for n in cluster.nodes}.values():
        lines += [f"{node.host_link.name}: {p.source}" for p in node.host_link.provenance.values()]
    return [*lines, *([HOST_ADAM_SOURCE] if setting.strategy.moved.optimizer else [])]


__all__ = ["HOST_STREAMS", "Sizes", "held_elements", "largest_layer", "layer_elements", "offload_notes", "offload_sources"]
