"""`allocate`: which devices of a mixed cluster run which layers, and which share of the batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.hardware import Cluster
from simtrain.core.runtime import Runtime
from simtrain.core.workload import Workload
from simtrain.cost import energy
from simtrain.cost.fabric import Fabric
from simtrain.planner.allocation.bound import check_bound
from simtrain.planner.allocation.engine_prices import market as engine_market
from simtrain.planner.allocation.families import Family, family
from simtrain.planner.allocation.kinds import Kind, carrier, kinds_of
from simtrain.planner.allocation.place import Placement, improve, place_shares
from simtrain.planner.allocation.program import Reading, read
from simtrain.planner.allocation.result import Allocation, Worth
from simtrain.planner.allocation.search import Found, search
from simtrain.planner.allocation.stages import Job

TENSORS = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
CHECKPOINTS = ("none", "full")

READ = 6
"""Proposals of the search that the engine reads."""

ASSUMPTIONS = (
    "gradients are reduced once all replicas have made theirs, weighted by their samples; nothing of it runs beside the backward passes",
    "optimizer states are whole in every replica (no ZeRO)",
    "devices that are left out are neither powered nor paid",
    "kinds are compared as their data sheets or profiles say; samples differ in share, not in length",
)


def allocate(
    workload: Workload | str,
    cluster: Cluster | str,
    global_batch: int,
    *,
    precision: str | None = None,
    optimizer: str = "adamw",
    runtime: Runtime | str | None = None,
    tensors: Sequence[int] = TENSORS,
    micro_batches: Sequence[int] = MICRO_BATCHES,
    checkpoints: Sequence[str] = CHECKPOINTS,
    memory_margin: float = 0.0,
    worth: bool = False,
) -> Allocation:
    """Allocates layers and shares of each batch to the devices of a cluster, equal or not.

    Replicas may differ in everything: pipelines of one or two device types, cut exactly, each type with its own tensor width, precision
    and checkpointing; their own micro-batch; their own number of micro-batches. Devices that do not help are left out.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster or its text, such as `"4x rtx-3090 + 8x v100-sxm2-16gb"`.
        global_batch: Samples of a step.
        precision: Recipe for all devices; by default the first 16-bit recipe that all have, else the first that each has.
        optimizer: Which one.
        runtime: What carries it out; eager PyTorch by default.
        tensors: Tensor-parallel widths to consider.
        micro_batches: Micro-batch sizes to consider.
        checkpoints: Activation checkpointing to consider, stage by stage.
        memory_margin: Share of the memory that stays free.
        worth: Whether to plan anew without one device and without all devices of each kind.

    Returns:
        The fastest plan found, as the engine's `schedule` reads it, with a lower bound.

    Raises:
        InputError: Nothing fits (naming the layer that fits nowhere), or a global batch that micro-batches do not make up.
        UnsupportedError: A model or device that is not modelled.
        InternalError: The bound lies above the plan's own time.
    """
    return Allocator(
        workload,
        cluster,
        global_batch,
        precision=precision,
        optimizer=optimizer,
        runtime=runtime,
        tensors=tensors,
        micro_batches=micro_batches,
        checkpoints=checkpoints,
        memory_margin=memory_margin,
    ).best(worth=worth)


class Allocator:
    """A question with its prices and templates, so that planning anew after a device has left or joined takes about a second.

    Args are those of `allocate`.
    """

    def __init__(
        self,
        workload: Workload | str,
        cluster: Cluster | str,
        global_batch: int,
        *,
        precision: str | None = None,
        optimizer: str = "adamw",
        runtime: Runtime | str | None = None,
        tensors: Sequence[int] = TENSORS,
        micro_batches: Sequence[int] = MICRO_BATCHES,
        checkpoints: Sequence[str] = CHECKPOINTS,
        memory_margin: float = 0.0,
    ) -> None:
        work = catalog.workload(workload) if isinstance(workload, str) else workload
        machines = catalog.cluster(cluster) if isinstance(cluster, str) else cluster
        if global_batch < 1:
            raise InputError(f"a global batch has at least 1 sample, not {global_batch}")
        kinds = kinds_of(machines, runtime, precision)
        self.job = Job(work, machines, Fabric(machines), {k.name: k for k in kinds}, optimizer)
        sizes = [size for size in sorted(set(micro_batches)) if size <= global_batch]
        if not sizes:
            raise InputError(f"micro-batches of {', '.join(map(str, micro_batches))} do not go into a global batch of {global_batch}")
        self.market = engine_market(self.job, global_batch, tensors, sizes, checkpoints, memory_margin)
        self.family: Family = family(self.market)
        self.read: dict[Placement, Reading] = {}

    def best(self, counts: Mapping[str, int] | None = None, *, worth: bool = False) -> Allocation:
        """The best plan.

        Args:
            counts: Devices of each kind that are there now; all of them by default.
            worth: Whether to plan anew without one device and without all devices of each kind.

        Raises:
            InputError: Nothing fits, or more devices than the cluster has.
            InternalError: The bound lies above the plan's own time.
        """
        start_s = time.monotonic()
        there = self._there(counts)
        found, placement, reading = self._plan(there)
        check_bound(found.bound_s, reading.step_time_s)
        used = _used(placement)
        kinds = {name: kind for name, kind in self.job.kinds.items() if used.get(name)}
        value = tuple(self._worth(name, there, placement, reading) for name in there if there[name]) if worth else ()
        uneven = len({tuple((s.start, s.end, s.unit.tensor) for s in p.share.template.stages) for p in placement}) > 1
        return Allocation(
            workload=self.job.workload.name,
            cluster=self.job.cluster.name,
            global_batch=self.market.global_batch,
            step_time_s=reading.step_time_s,
            bound_s=found.bound_s,
            placement=placement,
            breakdown_s=reading.breakdown_s,
            synchronise_s=reading.synchronise_s,
            memory=reading.memory,
            energy_j=sum(self._energy_j(reading).values()) + self._hosts_j(placement, reading),
            cost_usd=sum(n * energy.device_cost_usd(self.job.kinds[k].device, reading.step_time_s) for k, n in used.items()),
            worth=value,
            left_out={name: n - used.get(name, 0) for name, n in there.items()},
            carrier=carrier(tuple(kinds.values()), uneven=uneven),
            precisions={name: kind.precision for name, kind in self.job.kinds.items()},
            templates=found.templates,
            elapsed_s=time.monotonic() - start_s,
            assumptions=(*self.job.cluster.assumptions, *ASSUMPTIONS),
            events=reading.events,
        )

    def _there(self, counts: Mapping[str, int] | None) -> dict[str, int]:
        whole = dict(self.market.counts)
        for name, n in (counts or {}).items():
            if name not in whole or not 0 <= n <= whole[name]:
                have = ", ".join(f"{v} x {k}" for k, v in whole.items())
                raise InputError(f"{n} x {name} are not among the devices of {self.job.cluster.name!r}: it has {have}")
            whole[name] = n
        return whole

    def _plan(self, counts: Mapping[str, int]) -> tuple[Found, Placement, Reading]:
        """Searches, places the best proposals, has the engine read them, and takes the fastest that fits."""
        available = self._available(counts)
        market = replace(self.market, counts=dict(counts))
        found = search(market, self.family)
        best: tuple[float, Placement, Reading] | None = None
        refused = ""
        for proposal in found.proposals[: 4 * READ]:
            try:
                placement = place_shares(available, proposal.shares)
            except InputError as error:
                refused = str(error)
                continue
            reading = self._read(placement)
            if len(self.job.cluster.nodes) > 1 and max(len(p.share.template.stages) for p in placement) > 1:
                placement, _ = improve(placement, lambda p: self._read(p).step_time_s, 12)
                reading = self._read(placement)
            if reading.fits and (best is None or reading.step_time_s < best[0]):
                best = (reading.step_time_s, placement, reading)
            elif not reading.fits:
                refused = "the ledger of a stage exceeds its device's memory"
            if best is not None and proposal is found.proposals[min(READ, len(found.proposals)) - 1]:
                break
        if best is None:
            raise InputError(f"none of the {len(found.proposals)} best plans can be placed: {refused}; give a memory_margin such as 0.05")
        return found, best[1], best[2]

    def _available(self, counts: Mapping[str, int]) -> dict[str, Kind]:
        """Kinds with so many devices: the last ones are those that are not there."""
        kinds = {}
        for name, kind in self.job.kinds.items():
            gone, nodes = kind.count - counts[name], []
            for ranks in reversed(kind.nodes):
                kept = ranks[: max(len(ranks) - gone, 0)]
                gone -= len(ranks) - len(kept)
                nodes.append(kept)
            kinds[name] = replace(kind, nodes=tuple(reversed(nodes)))
        return kinds

    def _read(self, placement: Placement) -> Reading:
        if placement not in self.read:
            self.read[placement] = read(self.job, self.market, placement)
        return self.read[placement]

    def _energy_j(self, reading: Reading) -> dict[str, float]:
        """Energy of the devices used, by device name."""
        found: dict[str, float] = {}
        for lane, busy in zip(reading.lanes, reading.busy_s, strict=True):
            one = energy.device_energy_j(lane.place.device, reading.step_time_s, busy)
            found[lane.place.device.name] = found.get(lane.place.device.name, 0.0) + one * len(lane.rank_class.ranks)
        return found

    def _hosts_j(self, placement: Placement, reading: Reading) -> float:
        ranks = [r for p in placement for copy in p.copies for stage in copy for r in stage]
        nodes = {int(self.job.fabric.node_of[r]) for r in ranks}
        return self.job.cluster.host_power_w * len(nodes) * reading.step_time_s

    def _worth(self, name: str, there: Mapping[str, int], placement: Placement, reading: Reading) -> Worth:
        """Plans anew without one device of a kind, and without all of them."""
        kind = self.job.kinds[name]
        busy = [
            (b, len(lane.rank_class.ranks))
            for lane, b in zip(reading.lanes, reading.busy_s, strict=True)
            if lane_kind(self.job, lane.rank_class.ranks) == name
        ]
        used = sum(n for _, n in busy)
        one = self._otherwise({**there, name: there[name] - 1})
        none = self._otherwise({**there, name: 0})
        energies = self._energy_j(reading)
        before = sum(energies.values()) + self._hosts_j(placement, reading)
        after = sum(self._energy_j(none[1]).values()) + self._hosts_j(*none) if none else inf
        return Worth(
            kind=name,
            devices=there[name],
            used=used,
            share=self._share(name, placement),
            busy=sum(b * n for b, n in busy) / used / reading.step_time_s if used else 0.0,
            without_one_s=one[1].step_time_s if one else inf,
            without_all_s=none[1].step_time_s if none else inf,
            energy_j=sum(energy.device_energy_j(kind.device, reading.step_time_s, b) * n for b, n in busy),
            energy_saved_j=before - after,
            cost_usd=used * energy.device_cost_usd(kind.device, reading.step_time_s),
        )

    def _otherwise(self, counts: Mapping[str, int]) -> tuple[Placement, Reading] | None:
        if not any(counts.values()):
            return None
        try:
            return self._plan(counts)[1:]
        except InputError:
            return None

    def _share(self, name: str, placement: Placement) -> float:
        """Samples times layers that a kind computes, over all of them."""
        total = 0.0
        for p in placement:
            own = sum(s.end - s.start for s in p.share.template.stages if s.unit.kind == name)
            total += p.share.samples * own / self.market.layers
        return total / self.market.global_batch


def lane_kind(job: Job, ranks: Sequence[int]) -> str:
    """The kind that ranks belong to."""
    return next(name for name, kind in job.kinds.items() if any(ranks[0] in node for node in kind.nodes))


def _used(placement: Placement) -> dict[str, int]:
    used: dict[str, int] = {}
    for p in placement:
        for stage in p.share.template.stages:
            used[stage.unit.kind] = used.get(stage.unit.kind, 0) + stage.unit.tensor * p.share.copies
    return used
