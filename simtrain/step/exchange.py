"""What replicas exchange: gradients as they are or compressed, or parameters every few steps; on the wire, on the device, in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simtrain.core.exchange import LOW_COMMUNICATION, compression_method, low_communication_method
from simtrain.core.workload import Collective, OperatorKind
from simtrain.cost import compression as methods
from simtrain.cost.collectives import CollectiveCost
from simtrain.cost.compression import Compression, LowCommunication
from simtrain.cost.fabric import Fabric
from simtrain.step.buckets import Bucket, gradient_buckets
from simtrain.step.costs import PassCost, chain, pass_cost
from simtrain.step.kernels import bucket_copy_kernels, elementwise_kernels
from simtrain.step.layout import Lane, Layout
from simtrain.step.network import Placed, cost, place
from simtrain.step.setting import Setting

WEIGHT_BITS, GRADIENT_BITS = 8, 4
"""Of ZeRO++ (Wang et al. 2023, recalled and not looked up)."""

TENSORS_PER_LAUNCH = 32
"""Tensors that one multi-tensor kernel takes (as for the optimizer)."""


def compressed(setting: Setting, bucket: Bucket, ranks: int) -> Compression | None:
    """How a bucket is compressed; `None` where it is exchanged as it is, or not at all.

    Args:
        setting: The question.
        bucket: Gradients that are exchanged together.
        ranks: How many exchange it.
    """
    name, value = compression_method(setting.strategy.compression)
    elements = float(sum(bucket.gradients))
    if name == "powersgd":
        shapes = [(shape[0], round(n / shape[0])) for shape, n in zip(bucket.shapes, bucket.gradients, strict=True)]
        return methods.power_sgd(shapes, int(value))
    if name == "topk":
        return methods.top_k(elements, value, ranks)
    if name == "1-bit":
        return methods.one_bit(elements)
    return methods.cast(elements, int(name.removesuffix("-bit"))) if name.endswith("-bit") else None


def reductions(layout: Layout, bucket: Bucket, placed: Placed) -> tuple[CollectiveCost, ...]:
    """Collectives that reduce a bucket, one after the other: everyone gets the sum, or each its share."""
    setting = layout.setting
    packed = compressed(setting, bucket, len(placed.ranks))
    if packed is not None:
        return tuple(cost(layout.fabric, m.collective, placed, m.size_bytes) for m in packed.messages)
    scatter = setting.strategy.zero >= 1 and setting.runtime.replicas.scatter_gradients
    kind = Collective.REDUCE_SCATTER if scatter else Collective.ALL_REDUCE
    return (cost(layout.fabric, kind, placed, bucket.size_bytes),)


def pack_cost(setting: Setting, lane: Lane, bucket: Bucket, placed: Placed) -> PassCost | None:
    """What compressing a bucket costs a rank, as communication; `None` where nothing is compressed."""
    packed = compressed(setting, bucket, len(placed.ranks))
    if packed is None:
        return None
    price = _kernels_cost(setting, lane, packed.compress_bytes, packed.compress_launches)
    return replace(price, wire_s=price.device_s)


def restore_cost(setting: Setting, lane: Lane, bucket: Bucket, placed: Placed) -> PassCost | None:
    """What a rank does with a reduced bucket: decompresses it, copies gradients that live outside it back; `None` for nothing.

    Both happen where both apply: what PyTorch's hooks of DistributedDataParallel return is a bucket, copied like any other
    (`torch/csrc/distributed/c10d/reducer.cpp`, `finalize_bucket_dense`).
    """
    costs = []
    packed = compressed(setting, bucket, len(placed.ranks))
    if packed is not None:
        costs.append(_kernels_cost(setting, lane, packed.decompress_bytes, packed.decompress_launches))
    if not (setting.runtime.replicas.gradient_as_bucket_view or setting.runtime.update.main_gradients):
        costs.append(pass_cost(lane.place.device, bucket_copy_kernels(bucket.gradients, setting.precision), setting.runtime))
    return chain(costs) if costs else None


def _kernels_cost(setting: Setting, lane: Lane, bytes_moved: float, launches: int) -> PassCost:
    """What kernels cost that memory binds."""
    if not launches:
        return PassCost(0.0, 0.0, 0.0, 0)
    kernels = elementwise_kernels("exchange", OperatorKind.ELEMENTWISE, [bytes_moved], [launches], setting.precision.state)
    return pass_cost(lane.place.device, kernels, setting.runtime)


def rare_exchange(setting: Setting, lane: Lane) -> LowCommunication | None:
    """What a rank exchanges every few steps; `None` where replicas exchange gradients."""
    name, steps = low_communication_method(setting.strategy.low_communication)
    if not name:
        return None
    trained = sum(p.elements for chunk in lane.chunks for p in chunk.trained)
    return methods.low_communication(LOW_COMMUNICATION[name], trained, steps) if trained else None


def averaging(layout: Layout, stage: int) -> CollectiveCost | None:
    """What the exchange every few steps asks of the fabric, spread over these steps; `None` where there is none."""
    low = rare_exchange(layout.setting, layout.by_stage[stage][0])
    if low is None:
        return None
    placed = place(layout.fabric, layout.grid.holder_groups(stage))
    whole, share = cost(layout.fabric, low.message.collective, placed, low.message.size_bytes), 1 / low.steps_between
    loads = {r: amount * share for r, amount in whole.loads.items()}
    return CollectiveCost(whole.algorithm, whole.latency_s * share, loads, whole.traffic_bytes * share)


def outer_cost(setting: Setting, lane: Lane) -> PassCost | None:
    """What the update after an exchange every few steps costs a rank, spread over these steps; `None` where there is none."""
    low = rare_exchange(setting, lane)
    if low is None:
        return None
    groups = -(-sum(len(chunk.trained) for chunk in lane.chunks) // TENSORS_PER_LAUNCH)
    whole, share = _kernels_cost(setting, lane, low.outer_bytes, groups * low.outer_passes), 1 / low.steps_between
    launches = round(whole.launches * share)
    return PassCost(whole.device_s * share, whole.host_s * share, whole.lead_s * share, launches)


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """ZeRO stage 3 with quantized gathers and gradients (ZeRO++; Wang et al. 2023, recalled and not looked up), without a second shard.

    Gradients are exchanged among the ranks of a node, summed, and exchanged again between nodes, where nodes hold equally many ranks.

    Attributes:
        setting: The question.
        fabric: Routes.
        hops: Groups of each exchange of gradients, and the share of the gradients that it carries.
    """

    setting: Setting
    fabric: Fabric
    hops: tuple[tuple[Placed, float], ...]

    @classmethod
    def of(cls, layout: Layout, stage: int) -> Quantized | None:
        """Returns `None` where gathers are not quantized."""
        if layout.setting.strategy.compression != "zero++":
            return None
        groups = layout.grid.holder_groups(stage)
        nodes = [_by_node(layout.fabric, group) for group in groups]
        own = len(nodes[0][0])
        if own == 1 or len(nodes[0]) == 1 or any(len(ranks) != own for node in nodes for ranks in node):
            return cls(layout.setting, layout.fabric, ((place(layout.fabric, groups), 1.0),))
        inside = place(layout.fabric, [ranks for node in nodes for ranks in node])
        across = place(layout.fabric, [ranks for node in nodes for ranks in zip(*node, strict=True)])
        return cls(layout.setting, layout.fabric, ((inside, 1.0), (across, 1 / own)))

    def scatter(self, parameters: float) -> tuple[CollectiveCost, ...]:
        """Exchanges that leave each rank all ranks' gradients of its shard, one after the other."""
        sizes = [methods.quantized_bytes(parameters * share, GRADIENT_BITS) for _, share in self.hops]
        return tuple(cost(self.fabric, Collective.ALL_TO_ALL, p, size) for (p, _), size in zip(self.hops, sizes, strict=True))

    def dequantize(self, lane: Lane, parameters: float) -> PassCost:
        """What turning gathered weights back to 16 bits costs a rank."""
        return self._priced(lane, methods.dequantize_traffic(parameters, WEIGHT_BITS, 2.0))

    def quantize(self, lane: Lane, parameters: float) -> PassCost:
        """What quantizing gradients costs a rank, for every exchange."""
        return self._priced(lane, sum(methods.quantize_traffic(parameters * share, GRADIENT_BITS) for _, share in self.hops))

    def add(self, lane: Lane, parameters: float) -> PassCost:
        """What summing exchanged gradients costs a rank."""
        return self._priced(
            lane, sum(methods.dequantize_traffic(parameters * s, GRADIENT_BITS, methods.GRADIENT_BYTES) for _, s in self.hops)
        )

    def _priced(self, lane: Lane, traffic_bytes: float) -> PassCost:
        price = _kernels_cost(self.setting, lane, traffic_bytes, 1)
        return replace(price, wire_s=price.device_s)


def _by_node(fabric: Fabric, group: tuple[int, ...]) -> list[tuple[int, ...]]:
    nodes: dict[int, list[int]] = {}
    for rank in group:
        nodes.setdefault(int(fabric.node_of[rank]), []).append(rank)
    return [tuple(ranks) for ranks in nodes.values()]


def held_bytes(setting: Setting, lane: Lane) -> float:
    """What compression keeps on a rank: its error feedback and factors, and the compressed forms of every bucket."""
    if setting.strategy.compression in ("none", "zero++"):
        return 0.0
    strategy, total = setting.strategy, 0.0
    holders = strategy.data * strategy.context
    for expert, ranks in ((False, holders), (True, holders // strategy.expert)):
        for chunk in lane.chunks if ranks > 1 else ():
            for bucket in gradient_buckets(chunk.workload, setting.precision, setting.runtime, expert=expert):
                packed = compressed(setting, bucket, ranks)
                if packed is not None:
                    total += packed.state_bytes + sum(m.size_bytes for m in packed.messages)
    return total


def notes(setting: Setting) -> list[str]:
    """What is assumed of exchanges other than of every step's gradients as they are."""
    strategy = setting.strategy
    compression, rare = strategy.compression, strategy.low_communication
    if compression == "none" and not rare:
        return []
    found = [f"what {rare or compression} does to convergence is not modelled: a step may bring less than one without it"]
    if rare:
        steps = low_communication_method(rare)[1]
        found.append(
            f"the exchange and the outer update every {steps} steps are spread evenly over them: step time, energy and cost are means over "
            f"{steps} steps, in which a device that waits for its host hides more of them than it would of a whole exchange"
        )
        return found
    found.append("compression moves the bytes of straightforward kernels and is bound by memory (assumption, not measured)")
    name = compression_method(compression)[0]
    if name == "zero++":
        found.append(
            f"ZeRO++: weights in {WEIGHT_BITS} bits in all gathers, gradients in {GRADIENT_BITS}; no second shard of the weights in a node"
        )
    if name == "1-bit":
        found.append("1-bit: a step after the warm-up, during which gradients are exchanged whole")
    if name == "powersgd":
        found.append("PowerSGD: both products and the orthogonal factors are computed before the first of the two exchanges")
    if name == "topk":
        found.append("top-k: the threshold is known, as from a sample; sorting would take longer")
    return found
