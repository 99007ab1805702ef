"""`allocate`: which devices of a mixed cluster run which layers, and which share of the batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

import numpy as np

from simtrain.core import catalog
from simtrain.core.errors import InputError, StrategyError
from simtrain.core.hardware import Cluster
from simtrain.core.runtime import Runtime
from simtrain.core.workload import Workload
from simtrain.cost import energy
from simtrain.cost.fabric import fabric_of
from simtrain.planner.allocation.bound import check_bound, layer_bound_s
from simtrain.planner.allocation.engine_prices import market as engine_market
from simtrain.planner.allocation.engine_prices import synchroniser
from simtrain.planner.allocation.families import family
from simtrain.planner.allocation.kinds import Kind, carrier, kinds_of
from simtrain.planner.allocation.place import Placement, improve, place_shares
from simtrain.planner.allocation.prices import Market, Share
from simtrain.planner.allocation.program import Reading, read
from simtrain.planner.allocation.result import Allocation, Worth
from simtrain.planner.allocation.search import Found, search
from simtrain.planner.allocation.stages import Job

TENSORS = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64, 128, 256)
CHECKPOINTS = ("none", "full")

READ = 4
"""Proposals of the search that fit and that the engine compares, whatever their device types."""

MOST_SCOPES = 24
"""Searches of one plan: over all devices, over fewer nodes, and again where the ledger refuses what the search took for fitting."""

FAR = 1.15
"""Proposals that the search expects to take so much longer than the best one read are not read, but for one of each choice of types."""

READ_EACH = 2
"""The same for each choice of device types."""

SWAPS = 5
"""Placements of the best that the engine reads beside the first one."""

ASSUMPTIONS = (
    "gradients are reduced weighted by samples: beside the last backward passes if replicas are single stages, else behind all",
    "optimizer states are whole in every replica (no ZeRO), and tensor-parallel ranks hold what lies between products whole (no sequence "
    "parallelism): where these help, `plan` finds more on equal devices",
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

    Replicas may differ in everything: pipelines of one to three device types, cut exactly, each type with its own tensor width, precision
    and checkpointing; their own micro-batch; their own number of micro-batches. Devices that do not help are left out.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster or its text, such as `"4x rtx-3090 + 8x v100-sxm2-16gb"`.
        global_batch: Samples of a step.
        precision: Recipe for all devices; by default the first 16-bit recipe that all of its class (GPUs, TPUs) have, else the first
            that each has.
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
        fabric = fabric_of(machines)
        fabric.latencies_s(np.zeros_like(fabric.first_of), fabric.first_of)  # refuses nodes that nothing connects
        self.job = Job(work, machines, fabric, {k.name: k for k in kinds}, optimizer)
        sizes = [size for size in sorted(set(micro_batches)) if size <= global_batch]
        if not sizes:
            raise InputError(f"micro-batches of {', '.join(map(str, micro_batches))} do not go into a global batch of {global_batch}")
        self.market = engine_market(self.job, global_batch, tensors, sizes, checkpoints, memory_margin)
        self.family = family(self.market)
        self._readings: dict[Placement, Reading] = {}

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
        value = tuple(self._worth(name, there, placement, reading) for name in there if there[name]) if worth else ()
        return self._result(there, placement, reading, found, value, time.monotonic() - start_s)

    def evaluate(self, plan: Sequence[Share]) -> Allocation:
        """Reads a plan of one's own: the stages, copies and micro-batches of every group of replicas.

        Raises:
            StrategyError: A replica leaves a layer out or has one twice, or the replicas do not make up the global batch.
            InputError: Stages do not go into the nodes, or a unit or micro-batch size that has no price.
        """
        start_s = time.monotonic()
        self._check(plan)
        placement = self._improved(self._placed(self.job.kinds, plan))
        reading = self._read(placement)
        found = Found((), layer_bound_s(self.market), len({s.template for s in plan}))
        check_bound(found.bound_s, reading.step_time_s)
        return self._result(dict(self.market.counts), placement, reading, found, (), time.monotonic() - start_s)

    def _check(self, plan: Sequence[Share]) -> None:
        for share in plan:
            ends = [0, *(s.end for s in share.template.stages)]
            if [s.start for s in share.template.stages] != ends[:-1] or ends[-1] != self.market.layers or sorted(set(ends)) != ends:
                raise StrategyError(
                    f"({share.template}) does not run each of the {self.market.layers} layers once: "
                    f"give stages that follow each other from 0 to {self.market.layers}"
                )
            for stage in share.template.stages:
                if (stage.unit, share.template.micro_batch) not in self.market.prices:
                    raise InputError(f"{stage} with micro-batch {share.template.micro_batch} has no price: allow it when asking")
        given = sum(s.samples for s in plan)
        if given != self.market.global_batch:
            raise StrategyError(f"the replicas process {given} samples together, the global batch is {self.market.global_batch}")

    def _result(
        self, there: Mapping[str, int], placement: Placement, reading: Reading, found: Found, worth: tuple[Worth, ...], elapsed_s: float
    ) -> Allocation:
        used = _used(placement)
        kinds = tuple(kind for name, kind in self.job.kinds.items() if used.get(name))
        no_price = sorted({k.device.name for k in kinds if k.device.price_usd_per_hour <= 0})
        unpriced = [f"no price is known of {', '.join(no_price)}: they are not in the cost"] if no_price else []
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
            worth=worth,
            left_out={name: n - used.get(name, 0) for name, n in there.items()},
            carrier=carrier(kinds, uneven=uneven),
            precisions={name: kind.precision for name, kind in self.job.kinds.items()},
            templates=found.templates,
            elapsed_s=elapsed_s,
            assumptions=(*self.job.cluster.assumptions, *ASSUMPTIONS, *unpriced),
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
        """Searches, has the engine read the best proposals, places the fastest that fits; then the same with fewer nodes."""
        whole: Found | None = None
        best: Placement | None = None
        refused = ""
        scopes = list(self._scopes(counts))
        for available, market in scopes:
            if whole and best and layer_bound_s(market) >= self._read(best).step_time_s:
                continue
            try:
                found = search(market, self.family)
            except InputError as error:
                if whole is None:
                    raise
                refused = str(error)
                continue
            whole = whole or found
            seen: Counter[frozenset[str]] = Counter()
            for proposal in found.proposals:
                if seen.total() >= READ and seen[proposal.kinds] >= READ_EACH:
                    continue
                if best and seen[proposal.kinds] and proposal.step_time_s > FAR * self._read(best).step_time_s:
                    continue
                try:
                    placement = self._placed(available, proposal.shares)
                except InputError as error:
                    refused = str(error)
                    continue
                if not self._read(placement).fits:
                    refused = "the ledger of a stage exceeds its device's memory"
                    if self._without(placement) and len(scopes) < MOST_SCOPES:
                        scopes.append((available, market))  # search once more among what is left
                    continue
                seen[proposal.kinds] += 1
                if best is None or self._read(placement).step_time_s < self._read(best).step_time_s:
                    best = placement
        if whole is None or best is None:
            raise InputError(f"none of the plans can be placed: {refused}; give a memory_margin such as 0.05")
        best = self._improved(best)
        return whole, best, self._read(best)

    def _without(self, placement: Placement) -> bool:
        """Drops templates of which a stage exceeds its devices' memory; returns whether there were any left to drop."""
        memory = iter(self._read(placement).memory)
        full = {p.share.template for p in placement if not all(next(memory).fits for _ in p.share.template.stages)}
        kept = [t not in full for t in self.family.templates]
        self.family = self.family.chosen(kept)
        return not all(kept)

    def _scopes(self, counts: Mapping[str, int]) -> Iterator[tuple[dict[str, Kind], Market]]:
        """All devices; then each kind alone in fewer nodes, for where what lies between nodes is slow."""
        available = self._available(counts)
        yield available, replace(self.market, counts=dict(counts))
        gradients = max(float(price.gradient_bytes.sum()) for price in self.market.prices.values())
        for name, kind in available.items():
            nodes = [ranks for ranks in kind.nodes if ranks]
            few = len(nodes) // 2
            while few:
                alone = {name: replace(kind, nodes=tuple(nodes[:few]))}
                there = {k: alone[k].count if k in alone else 0 for k in counts}
                fewer = synchroniser(replace(self.job, kinds=alone), gradients)
                yield alone, replace(self.market, counts=there, synchronise_s=fewer)
                few //= 2

    def _placed(self, available: Mapping[str, Kind], plan: Sequence[Share]) -> Placement:
        """The faster of two placements, where there is a choice."""
        first = place_shares(available, plan)
        if len(self.job.cluster.nodes) == 1 or all(len(s.template.stages) == 1 for s in plan):
            return first
        return min((first, place_shares(available, plan, together="stage")), key=lambda p: self._read(p).step_time_s)

    def _improved(self, placement: Placement) -> Placement:
        if len(self.job.cluster.nodes) == 1 or all(len(p.share.template.stages) == 1 for p in placement):
            return placement
        return improve(placement, lambda p: self._read(p).step_time_s, SWAPS)[0]

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
        if placement not in self._readings:
            self._readings[placement] = read(self.job, self.market, placement)
        return self._readings[placement]

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
        pairs = zip(reading.lanes, reading.busy_s, strict=True)
        busy = [(b, len(lane.rank_class.ranks)) for lane, b in pairs if _lane_kind(self.job, lane.rank_class.ranks) == name]
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


def _lane_kind(job: Job, ranks: Sequence[int]) -> str:
    """The kind that ranks belong to."""
    return next(name for name, kind in job.kinds.items() if any(ranks[0] in node for node in kind.nodes))


def _used(placement: Placement) -> dict[str, int]:
    used: dict[str, int] = {}
    for p in placement:
        for stage in p.share.template.stages:
            used[stage.unit.kind] = used.get(stage.unit.kind, 0) + stage.unit.tensor * p.share.copies
    return used
