"""Offloading as terms of the program: copies on streams of their own in each direction, the update on the host between them.

Streams are in order, one for each direction of a rank's link, so that copies both ways run at once and with computation; what lanes and
ranks share (uplinks of PCIe switches, host memory, drives) are resources like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simtrain.core.program import TermKind
from simtrain.cost.collectives import CollectiveCost
from simtrain.cost.host import drive_copy, host_copy, host_update
from simtrain.step.builder import Builder
from simtrain.step.layout import Lane, Layout
from simtrain.step.offload import STAGING_BUFFERS, Sizes, held_elements, layer_elements

HOST_STREAMS = ("host update", "drives read", "drives write")
"""Streams of a host: its memory and drives serve the stages on it one after the other, which takes as long as all of them at once."""


class HostSide:
    """What lanes exchange with their hosts around the update.

    Args:
        layout: Who does what.
        build: Where terms go.

    Attributes:
        begun: For each lane, the term with which its update begins.
    """

    def __init__(self, layout: Layout, build: Builder) -> None:
        self.layout, self.build, self.moved = layout, build, layout.setting.strategy.moved
        self.sizes = Sizes.of(layout.setting)
        self.sent: dict[int, list[tuple[float, int]]] = {}
        self.first_fetch: dict[int, int] = {}
        self.begun: list[int] = []
        self.known: dict[tuple[object, ...], CollectiveCost] = {}
        self.beside = _beside(layout)

    @classmethod
    def of(cls, layout: Layout, build: Builder) -> HostSide | None:
        """Returns `None` where the optimizer stays on the device."""
        return cls(layout, build) if layout.setting.strategy.moved.optimizer else None

    def _copy(self, lane: Lane, size_bytes: float, *, out: bool, tier: str) -> CollectiveCost:
        ranks, drives = lane.rank_class.ranks, tier == "nvme"
        return self._price(("copy", lane.index, size_bytes, out, drives), lambda f: host_copy(f, ranks, size_bytes, out=out, drives=drives))

    def _price(self, key: tuple[object, ...], price: Callable[..., CollectiveCost]) -> CollectiveCost:
        if key not in self.known:
            self.known[key] = price(self.layout.fabric)
        return self.known[key]

    def _add(self, lane: Lane, stream: str, label: str, price: CollectiveCost, waits: Sequence[int]) -> int:
        users = self.beside[lane.index] if stream in HOST_STREAMS else (lane.index,)
        return self.build.transfer(TermKind.OFFLOAD, self.build.stream(users, stream), label, price, waits)

    def fetch(self, lanes: Sequence[Lane], size_bytes: float, waits: Sequence[int]) -> list[int]:
        """Brings a shard of a layer's weights to the device; what is waited for makes room for it."""
        if not self.moved.parameters:
            return list(waits)
        terms = []
        for lane in lanes:
            price = self._copy(lane, size_bytes, out=False, tier=self.moved.parameters)
            terms.append(self._add(lane, "from host", "fetch parameters", price, waits))
            self.first_fetch.setdefault(lane.index, terms[-1])
        return terms

    def gradients(self, lanes: Sequence[Lane], elements: float, waits: Sequence[int], *, again: bool) -> None:
        """Sends gradients to the host as they are complete.

        Args:
            lanes: Whose.
            elements: Of this rank's share.
            waits: What makes them.
            again: Whether those of earlier micro-batches are there already: they are fetched and added on the device (as DeepSpeed does).
        """
        if not self.moved.gradients:
            return
        size, tier = elements * self.sizes.gradient, self.moved.gradients
        for lane in lanes:
            before = list(waits)
            if again:
                price = self._copy(lane, size, out=False, tier=tier)
                before.append(self._add(lane, "from host", "fetch gradients", price, ()))
            price = self._copy(lane, size, out=True, tier=tier)
            sent = self.sent.setdefault(lane.index, [])
            whole = held_elements(self.layout.setting, lane, trained=True)
            done = sent[-1][0] if sent and sent[-1][0] < whole * (1 - 1e-9) else 0.0  # a new micro-batch begins anew
            if not done:
                sent.clear()
            sent.append((done + elements, self._add(lane, "to host", "send gradients", price, before)))

    def update(self, lane: Lane, waits: Sequence[int]) -> int:
        """Adds the update of a lane on its host, layer by layer; returns the last term of it."""
        setting, drives = self.layout.setting, "nvme"
        ranks, sizes = lane.rank_class.ranks, self.sizes
        late = self.moved.delayed
        begun = [self.build.blocked_host(lane.index, "wait for gradients", waits)]
        self.begun += begun
        updated: list[int] = []
        freed: list[int] = []  # behind which terms buffers are free
        last, summed = begun[0], 0.0
        for chunk in lane.chunks:
            for _, n in layer_elements(setting, chunk):
                summed += n
                arrived = self._arrived(lane, summed)
                gradient, state = n * sizes.gradient, n * sizes.state
                inputs, ready = ([], []) if late else ([*begun, *arrived], [*waits, *arrived])
                if not self.moved.gradients:
                    inputs.append(self._add(lane, "to host", "send gradients", self._copy(lane, gradient, out=True, tier="host"), waits))
                loaded = (state if self.moved.optimizer == drives else 0.0) + (gradient if self.moved.gradients == drives else 0.0)
                if loaded:
                    room = freed[-STAGING_BUFFERS : 1 - STAGING_BUFFERS] if len(freed) >= STAGING_BUFFERS else []
                    price = self._price(("read", lane.index, loaded), lambda f, b=loaded: drive_copy(f, ranks, b, reads=True))
                    inputs.append(self._add(lane, "drives read", "read optimizer state", price, [*ready, *room]))
                price = self._price(("update", lane.index, n), lambda f, b=n * sizes.update: host_update(f, ranks, b))
                done = self._add(lane, "host update", "update on the host", price, inputs)
                if late:  # these gradients are updated with beside the next step
                    self.build.carries += [(term, done, 0.0) for term in arrived]
                updated.append(done)
                last, free = self._leave(lane, n, [done, *(waits if late else [])])
                freed.append(free)
        if updated and not late:
            self.build.blocked_host(lane.index, "update on the host", [updated[-1]])
        self._carry(lane, last)
        return last

    def _arrived(self, lane: Lane, elements: float) -> list[int]:
        """The copy with which so many gradients have arrived, in the order in which backward makes them."""
        sent = self.sent.get(lane.index, [])
        return next(([term] for upto, term in sent if upto >= elements * (1 - 1e-9)), [term for _, term in sent[-1:]])

    def _leave(self, lane: Lane, elements: float, done: Sequence[int]) -> tuple[int, int]:
        """Sends what an update has made to where it lives; returns when the next step may use it, and when its buffer is free."""
        ranks, sizes, last, free = lane.rank_class.ranks, self.sizes, done[0], done[0]
        weight = elements * sizes.weight
        stored = (elements * sizes.state if self.moved.optimizer == "nvme" else 0.0) + (weight if self.moved.parameters == "nvme" else 0.0)
        if stored:
            price = self._price(("write", lane.index, stored), lambda f: drive_copy(f, ranks, stored, reads=False))
            free = self._add(lane, "drives write", "write optimizer state", price, done[:1])
            last = free if self.moved.parameters == "nvme" else last
        if not self.moved.parameters:
            last = self._add(lane, "from host", "send parameters", self._copy(lane, weight, out=False, tier="host"), done)
        return last, free

    def _carry(self, lane: Lane, last: int) -> None:
        """Nothing of the next step that reads weights begins before they are there."""
        first = self.first_fetch.get(lane.index, self.build.first_work(lane.index))
        self.build.carries.append((last, first, 0.0))


def _beside(layout: Layout) -> list[tuple[int, ...]]:
    """For each lane, those that have hosts in common with it, itself among them."""
    groups: list[tuple[set[int], list[int]]] = []
    for lane in layout.lanes:
        nodes = {int(layout.fabric.node_of[rank]) for rank in lane.rank_class.ranks}
        met = [group for group in groups if group[0] & nodes]
        groups = [group for group in groups if not group[0] & nodes]
        groups.append((nodes.union(*(n for n, _ in met)), [i for _, lanes in met for i in lanes] + [lane.index]))
    return [next(tuple(sorted(lanes)) for _, lanes in groups if lane.index in lanes) for lane in layout.lanes]


__all__ = ["HostSide"]
