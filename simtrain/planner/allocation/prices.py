"""What a search for an allocation knows: units of devices, what layers cost on them, and what moves between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray

Transfers = Literal["rendezvous", "sender", "asynchronous"]
"""Who waits while an activation or a gradient moves between stages: both ends, the sender, or nobody."""


class Unit(NamedTuple):
    """Equal devices that share layers by tensor parallelism: the smallest thing that holds a stage.

    Attributes:
        kind: Device type, as the question names it.
        tensor: Devices.
        checkpoint: Activation checkpointing.
        sequence: Whether its devices split what lies between their products along the sequence, too.
        precision: Recipe; "" for that of the device type.
    """

    kind: str
    tensor: int
    checkpoint: str = "none"
    sequence: bool = False
    precision: str = ""

    @property
    def shape(self) -> tuple[str, int, bool]:
        """What is decided before a pipeline is cut; checkpointing and precision are chosen stage by stage."""
        return self.kind, self.tensor, self.sequence


@dataclass(frozen=True, slots=True, eq=False)
class LayerPrices:
    """What each layer costs on a unit, at one micro-batch size. All arrays have one entry per layer.

    Attributes:
        forward_s: Forward pass of a micro-batch.
        backward_s: Backward pass of a micro-batch, recomputation included.
        least_s: What no order of work can take less than: both passes on the device alone.
        update_s: Optimizer.
        gradient_bytes: Gradients on each device that replicas exchange.
        fixed_bytes: Persistent memory on each device.
        kept_bytes: What a micro-batch in flight keeps on each device.
        spare_bytes: Memory of a device for all that.
        shared_bytes: Part of the persistent memory that replicas share under ZeRO stage 1.
        shared_update_s: Part of the optimizer's time that they share.
        parameter_bytes: Updated parameters on each device, which they gather.
    """

    forward_s: FloatArray
    backward_s: FloatArray
    least_s: FloatArray
    update_s: FloatArray
    gradient_bytes: FloatArray
    fixed_bytes: FloatArray
    kept_bytes: FloatArray
    spare_bytes: float
    shared_bytes: FloatArray | float = 0.0
    shared_update_s: FloatArray | float = 0.0
    parameter_bytes: FloatArray | float = 0.0

    def shared(self, replicas: int) -> LayerPrices:
        """The same where so many replicas share the optimizer's states."""
        gone = 1 - 1 / replicas
        fixed, update = self.fixed_bytes - gone * self.shared_bytes, self.update_s - gone * self.shared_update_s
        return replace(self, fixed_bytes=fixed, update_s=update)


@dataclass(frozen=True, eq=False)
class Market:
    """A question with its prices.

    Attributes:
        counts: Devices of each kind.
        prices: Of layers, by unit and micro-batch size.
        send_s: Time of the activation of a micro-batch (or of its gradient) from one unit to another; gets both, its samples, and
            whether they are in one node.
        synchronise_s: Time to reduce gradients over replicas; gets their bytes on a device, the number of replicas, and the device types
            that hold them.
        global_batch: Samples of a step.
        node_devices: Devices of each kind in a node.
        transfers: Who waits for what is sent.
        most_stages: Longest pipeline to consider.
        memory_margin: Share of the memory that stays free.
        known: Sums over ranges of layers that were asked for before.
        known_sends: Transfers that were.
        known_room: What fits where.
    """

    counts: Mapping[str, int]
    prices: Mapping[tuple[Unit, int], LayerPrices]
    send_s: Callable[[Unit, Unit, int, bool], float]
    synchronise_s: Callable[[float, int, frozenset[str]], float]
    global_batch: int
    node_devices: Mapping[str, int]
    transfers: Transfers = "rendezvous"
    most_stages: int = 8
    memory_margin: float = 0.0
    known: dict[object, FloatArray] = field(default_factory=dict, repr=False)
    known_sends: dict[object, tuple[float, ...]] = field(default_factory=dict, repr=False)
    known_room: dict[object, tuple[bytes, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise InputError(f"a global batch has at least 1 sample, not {self.global_batch}")
        if not any(n > 0 for n in self.counts.values()):
            raise InputError("there is no device to allocate: give a cluster with at least one")

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(next(iter(self.prices.values())).forward_s)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Units that have a price, in order of kinds."""
        order = list(dict.fromkeys([*self.counts, *(unit.kind for unit, _ in self.prices)]))
        return tuple(sorted({unit for unit, _ in self.prices}, key=lambda u: (order.index(u.kind), *u[1:])))

    def shared(self, replicas: int, factor: float) -> Market:
        """The same under ZeRO stage 1.

        Args:
            replicas: How many share the optimizer's states at least; with fewer of them memory would not suffice for all that fits here.
            factor: Time to scatter gradients and gather parameters, over that of reducing gradients.
        """
        prices = {key: price.shared(replicas) for key, price in self.prices.items()}
        whole = self.synchronise_s
        return replace(self, prices=prices, synchronise_s=lambda *held: factor * whole(*held), known={}, known_room={})

    @cached_property
    def _variants(self) -> dict[tuple[tuple[str, int, bool], int], tuple[Unit, ...]]:
        found: dict[tuple[tuple[str, int, bool], int], tuple[Unit, ...]] = {}
        for unit in self.units:
            for size in self.micro_batches:
                if (unit, size) in self.prices:
                    key = (unit.shape, size)
                    found[key] = (*found.get(key, ()), unit)
        return found

    def variants(self, unit: Unit, micro_batch: int) -> tuple[Unit, ...]:
        """The same devices with every checkpointing and precision that has a price."""
        return self._variants.get((unit.shape, micro_batch), ())

    @cached_property
    def micro_batches(self) -> tuple[int, ...]:
        """Micro-batch sizes that have a price."""
        return tuple(sorted({size for _, size in self.prices}))

    def stage_s(self, unit: Unit, size: int) -> FloatArray:
        """Forward and backward time of every range of layers, [first, last]; infinite where last < first."""
        key = ("time", unit, size)
        if key not in self.known:
            price = self.prices[unit, size]
            self.known[key] = ranges(price.forward_s + price.backward_s)
        return self.known[key]

    def gradients(self, unit: Unit, size: int) -> FloatArray:
        """Gradient bytes on each device of every range of layers."""
        key = ("gradient", unit, size)
        if key not in self.known:
            self.known[key] = ranges(self.prices[unit, size].gradient_bytes)
        return self.known[key]

    def memory_bytes(self, unit: Unit, size: int, in_flight: int) -> FloatArray:
        """Memory on each device of every range of layers, with so many micro-batches in flight."""
        key = ("memory", unit, size, in_flight)
        if key not in self.known:
            price = self.prices[unit, size]
            self.known[key] = ranges(price.fixed_bytes + in_flight * price.kept_bytes)
        return self.known[key]

    def spare_bytes(self, unit: Unit, size: int) -> float:
        """Memory that may be used on each device."""
        return self.prices[unit, size].spare_bytes * (1 - self.memory_margin)

    def sends_s(self, units: Sequence[Unit], micro_batch: int) -> tuple[float, ...]:
        """Time of one transfer behind each stage but the last. Stages of a replica fill nodes one after the other."""
        key = (tuple(units), micro_batch)
        if key not in self.known_sends:
            together = self._same_node(units)
            pairs = zip(pairwise(units), together, strict=True)
            self.known_sends[key] = tuple(self.send_s(a, b, micro_batch, same) for (a, b), same in pairs)
        return self.known_sends[key]

    def _same_node(self, units: Sequence[Unit]) -> list[bool]:
        taken = {u.kind: sum(x.tensor for x in units if x.kind == u.kind) for u in units}
        before = dict.fromkeys(taken, 0)
        found = []
        for a, b in pairwise(units):
            start = before[a.kind]
            before[a.kind] = start + a.tensor
            node = self.node_devices[a.kind]
            aligned = taken[a.kind] % node == 0 or node % taken[a.kind] == 0
            within = start // node == (start + a.tensor + b.tensor - 1) // node
            found.append(a.kind == b.kind and aligned and within)
        return found


def ranges(values: FloatArray) -> FloatArray:
    """Sums over every range of layers, [first, last]; infinite where last < first."""
    ends = np.concatenate([[0.0], np.cumsum(values)])
    sums = ends[None, 1:] - ends[:-1, None]
    return np.where(np.tri(len(values), k=-1, dtype=bool), np.inf, sums)


@dataclass(frozen=True, slots=True)
class StageUse:
    """A stage of a template: which unit runs which layers.

    Attributes:
        unit: What runs it.
        start: First layer.
        end: Layer after the last.
    """

    unit: Unit
    start: int
    end: int

    def __str__(self) -> str:
        width = f" x{self.unit.tensor}{' of a sequence' * self.unit.sequence}" if self.unit.tensor > 1 else ""
        kept = f" {self.unit.checkpoint} checkpoint" if self.unit.checkpoint != "none" else ""
        recipe = f" {self.unit.precision}" if self.unit.precision else ""
        return f"{self.unit.kind}{width}[{self.start}:{self.end}]{recipe}{kept}"


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of replica: stages in order, and the micro-batch that it processes."""

    stages: tuple[StageUse, ...]
    micro_batch: int

    def devices(self, kind: str) -> int:
        """How many devices of a kind it takes."""
        return sum(s.unit.tensor for s in self.stages if s.unit.kind == kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Device types in it, in order of stages."""
        return tuple(dict.fromkeys(s.unit.kind for s in self.stages))

    def __str__(self) -> str:
        return f"{' | '.join(map(str, self.stages))}, micro-batch {self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Share:
    """Equal replicas: a template, copies of it, and what each processes in a step."""

    template: Template
    copies: int
    micro_batches: int

    @property
    def samples(self) -> int:
        """Samples of a step that these replicas process together."""
        return self.copies * self.micro_batches * self.template.micro_batch
