"""Lowering: from a checked setting to the program of a step.

Data parallelism: every rank runs the passes of its micro-batches; in the last one, gradients go into buckets that are all-reduced as
they fill, while backward goes on; then they are copied back and the optimizer runs. ZeRO stage 1 updates a share of the parameters on
each rank and gathers them afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from simtrain.core.hardware import Device
from simtrain.core.program import IntArray, Program, RankClass, Resource, Stream, TermKind
from simtrain.core.workload import Workload
from simtrain.cost.collectives import CollectiveCost, all_gather, all_reduce
from simtrain.cost.fabric import Fabric
from simtrain.step.buckets import Bucket, gradient_buckets
from simtrain.step.costs import TERM_KINDS, PassCost, layer_pass_cost, pass_cost
from simtrain.step.kernels import bucket_copy_kernels, optimizer_kernels
from simtrain.step.occupancy import Mode
from simtrain.step.passes import Pass, micro_batch_passes
from simtrain.step.setting import Setting
from simtrain.step.specialize import concrete_layers


@dataclass(frozen=True, slots=True, eq=False)
class StepCosts:
    """Costs of a step on one kind of device, before composition.

    Attributes:
        first: Passes of the first micro-batch, in host order.
        later: Passes of any other (the same layers and modes, with accumulation).
        costs: Cost of each of these for a micro-batch that is not the last: first, then later.
        last: Cost of each pass of the last micro-batch (copies into buckets included).
        copy_back: Cost of copying each bucket back.
        update: Cost of the optimizer.
    """

    first: tuple[Pass, ...]
    later: tuple[Pass, ...]
    costs: tuple[tuple[PassCost, ...], tuple[PassCost, ...]]
    last: tuple[PassCost, ...]
    copy_back: tuple[PassCost, ...]
    update: PassCost


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """A program and what it was made from.

    Attributes:
        program: Terms for `schedule` and `simulate`.
        rank_classes: Who runs it.
        costs: Per rank class, for `estimate`.
        buckets: Of the gradients (empty without data parallelism).
        reductions: Cost of each bucket's all-reduce.
        gather: Cost of gathering updated parameters (ZeRO stage 1), or `None`.
        pass_terms: For each rank class, the compute term of each pass in execution order, the optimizer last.
    """

    program: Program
    rank_classes: tuple[RankClass, ...]
    costs: tuple[StepCosts, ...]
    buckets: tuple[Bucket, ...]
    reductions: tuple[CollectiveCost, ...]
    gather: CollectiveCost | None
    pass_terms: tuple[IntArray, ...]


def rank_classes(setting: Setting, *, split: bool) -> tuple[RankClass, ...]:
    """Groups ranks that behave alike: by device, or one class per rank if `split` (when ranks are disturbed one by one)."""
    if split:
        return tuple(RankClass(f"rank {r}", (r,), d) for r, d in enumerate(setting.devices))
    groups: dict[Device, list[int]] = {}
    for rank, device in enumerate(setting.devices):
        groups.setdefault(device, []).append(rank)
    return tuple(RankClass(f"{d.name} x{len(ranks)}", tuple(ranks), d) for d, ranks in groups.items())


def step_costs(setting: Setting, device: Device, buckets: tuple[Bucket, ...]) -> StepCosts:
    """Prices every pass of a step on a device."""
    workload, strategy, runtime = setting.workload, setting.strategy, setting.runtime
    concrete = concrete_layers(workload, setting.precision, runtime)
    first = micro_batch_passes(workload, concrete, strategy.checkpoint, accumulating=False)
    later = micro_batch_passes(workload, concrete, strategy.checkpoint, accumulating=True)
    # gradients are new tensors in every step, so they are copied into buckets even where they become views of them afterwards
    copies = bool(buckets)

    def price(step: Pass, in_last: bool) -> PassCost:
        return layer_pass_cost(
            device,
            concrete[step.kind],
            step.mode,
            step.context.last_of_segment,
            strategy.micro_batch,
            workload.sequence,
            runtime,
            copies and in_last and step.mode in (Mode.BACKWARD, Mode.BACKWARD_ACCUMULATING),
        )

    ends = first if strategy.accumulation == 1 else later
    back = [pass_cost(device, bucket_copy_kernels(b.gradients, setting.precision), runtime) for b in buckets]
    parameters = [p.elements for layer in workload for p in layer.parameters if p.tied_to is None]
    shards = strategy.data if strategy.zero else 1
    update = pass_cost(device, optimizer_kernels(parameters, strategy.optimizer, setting.precision, runtime, shards), runtime)
    return StepCosts(
        first=first,
        later=later,
        costs=(tuple(price(p, False) for p in first), tuple(price(p, False) for p in later)),
        last=tuple(price(p, True) for p in ends),
        copy_back=() if runtime.gradient_as_bucket_view else tuple(back),
        update=update,
    )


def collectives(setting: Setting) -> tuple[tuple[Bucket, ...], tuple[CollectiveCost, ...], CollectiveCost | None]:
    """Returns gradient buckets, the cost of reducing each, and of gathering parameters after a sharded update."""
    ranks = range(setting.strategy.data)
    if len(ranks) == 1:
        return (), (), None
    fabric = Fabric(setting.cluster)
    buckets = gradient_buckets(setting.workload, setting.precision, setting.runtime)
    by_size = {size: all_reduce(fabric, ranks, size) for size in {b.size_bytes for b in buckets}}
    gather = None
    if setting.strategy.zero == 1:
        gather = all_gather(fabric, ranks, setting.workload.parameter_count * setting.precision.parameter.size_bytes)
    return buckets, tuple(by_size[b.size_bytes] for b in buckets), gather


def lower(setting: Setting, *, split: bool = False) -> Lowered:
    """Builds the program of a step.

    Args:
        setting: The checked question.
        split: Give every rank a class of its own.
    """
    buckets, reductions, gather = collectives(setting)
    classes = rank_classes(setting, split=split)
    by_device = {c.device: None for c in classes}
    priced = {device: step_costs(setting, device, buckets) for device in by_device}
    costs = tuple(priced[c.device] for c in classes)
    build = _Builder(setting, classes)
    pass_terms = [build.passes(i, c) for i, c in enumerate(costs)]
    ends = bucket_cells(costs[0], buckets)
    reduce_terms: list[int] = []
    for bucket, cost, cell in zip(buckets, reductions, ends, strict=True):
        waits = [int(terms[cell]) for terms in pass_terms] if setting.runtime.overlap_communication else [int(t[-1]) for t in pass_terms]
        reduce_terms.append(build.collective(f"all-reduce {bucket.size_bytes / 2**20:.0f} MiB", cost, waits))
    for i, c in enumerate(costs):
        for back, term in zip(c.copy_back, reduce_terms, strict=bool(c.copy_back)):
            build.work(i, TermKind.GRADIENT_COPY, "copy bucket back", back, -1, waits=[term])
    updates = [
        build.work(i, TermKind.OPTIMIZER, "optimizer", c.update, -1, waits=reduce_terms[-1:], sync=True) for i, c in enumerate(costs)
    ]
    if gather is not None:
        build.carried = build.collective("all-gather parameters", gather, updates)
    return Lowered(
        program=build.finish(),
        rank_classes=classes,
        costs=costs,
        buckets=buckets,
        reductions=reductions,
        gather=gather,
        pass_terms=tuple(np.append(terms, update) for terms, update in zip(pass_terms, updates, strict=True)),
    )


def bucket_cells(costs: StepCosts, buckets: tuple[Bucket, ...]) -> list[int]:
    """Index (from the end, so that it counts in the last micro-batch) of the backward pass that completes each bucket."""
    passes = costs.first
    backward = {p.layer: i - len(passes) for i, p in enumerate(passes) if p.mode is Mode.BACKWARD}
    return [backward[b.ready_after_layer] for b in buckets]


@dataclass
class _Builder:
    """Collects terms as columns; `finish` turns them into a `Program`."""

    setting: Setting
    classes: tuple[RankClass, ...]
    columns: list[tuple[int, int, int, int, float]] = field(default_factory=list)
    demands: list[tuple[int, int, float]] = field(default_factory=list)
    edges: list[tuple[int, int, float]] = field(default_factory=list)
    carries: list[tuple[int, int, float]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    resources: dict[Resource, int] = field(default_factory=dict)
    carried: int = -1

    def __post_init__(self) -> None:
        self.has_host = self.setting.runtime.run_ahead_launches > 0
        names = ("host", "compute") if self.has_host else ("compute",)
        self.streams = [Stream(i, name) for i in range(len(self.classes)) for name in names] + [Stream(-1, "communication")]
        self.last: dict[int, int] = {}
        self.first: dict[int, tuple[int, float]] = {}
        self.launches: list[list[tuple[int, int, int]]] = [[] for _ in self.classes]

    def _term(self, kind: TermKind, stream: int, label: str, micro_batch: int, latency_s: float = 0.0) -> int:
        index = len(self.columns)
        self.columns.append((kind, stream, self.labels.setdefault(label, len(self.labels)), micro_batch, latency_s))
        if stream in self.last:
            self.edges.append((index, self.last[stream], 0.0))
        self.last[stream] = index
        return index

    def _stream(self, rank_class: int, name: str) -> int:
        return rank_class * (2 if self.has_host else 1) + (1 if self.has_host and name == "compute" else 0)

    def _demand(self, term: int, resource: Resource, amount: float) -> None:
        self.demands.append((term, self.resources.setdefault(resource, len(self.resources)), amount))

    def passes(self, rank_class: int, costs: StepCosts) -> IntArray:
        """Adds all micro-batches of a rank class; returns its compute terms."""
        accumulation = self.setting.strategy.accumulation
        workload = self.setting.workload
        terms: list[int] = []
        for micro_batch in range(accumulation):
            steps = costs.first if micro_batch == 0 else costs.later
            priced = costs.last if micro_batch == accumulation - 1 else costs.costs[0 if micro_batch == 0 else 1]
            for step, cost in zip(steps, priced, strict=True):
                terms.append(self.work(rank_class, TERM_KINDS[step.mode], _label(workload, step), cost, micro_batch))
        return np.array(terms, dtype=np.int64)

    def work(
        self,
        rank_class: int,
        kind: TermKind,
        label: str,
        cost: PassCost,
        micro_batch: int,
        waits: list[int] | None = None,
        sync: bool = False,
    ) -> int:
        """Adds kernels: a host term that issues them and a compute term that runs them. Returns the compute term."""
        compute = self._stream(rank_class, "compute")
        if self.has_host:
            host = self._stream(rank_class, "host")
            before = self.last.get(host)
            issue = self._term(TermKind.HOST, host, f"issue {label}", micro_batch, cost.host_s)
            self._bound_run_ahead(rank_class, issue, cost.launches)
            if sync and self.setting.precision.loss_scaling:
                # the scaler asks whether any reduced gradient overflowed
                self.edges += [(issue, done, 0.0) for done in (self.last[compute], *(waits or ()))]
            run = self._term(kind, compute, label, micro_batch)
            if before is None:
                self.first[rank_class] = (run, cost.lead_s)
            else:
                self.edges.append((run, before, cost.lead_s))
            self.launches[rank_class].append((issue, run, cost.launches))
        else:
            run = self._term(kind, compute, label, micro_batch)
        self._demand(run, Resource(f"{self.classes[rank_class].name} compute", 1.0), cost.device_s)
        self.edges += [(run, w, 0.0) for w in waits or ()]
        return run

    def _bound_run_ahead(self, rank_class: int, issue: int, launches: int) -> None:
        behind = launches
        for _, run, count in reversed(self.launches[rank_class]):
            if behind > self.setting.runtime.run_ahead_launches:
                self.edges.append((issue, run, 0.0))
                return
            behind += count

    def _run_ahead_limit(self, rank_class: int) -> int:
        """Host term that must not be issued before the device has finished the step before (at most one step ahead)."""
        issued = 0
        for issue, _, count in self.launches[rank_class]:
            issued += count
            if issued > self.setting.runtime.run_ahead_launches:
                return issue
        return self.launches[rank_class][-1][0]

    def collective(self, label: str, cost: CollectiveCost, waits: list[int]) -> int:
        """Adds a collective on the communication stream."""
        term = self._term(TermKind.COLLECTIVE, len(self.streams) - 1, label, -1, cost.latency_s)
        for resource, amount in cost.loads.items():
            self._demand(term, resource, amount)
        self.edges += [(term, w, 0.0) for w in waits]
        return term

    def finish(self) -> Program:
        """Sorts edges and demands into CSR form and closes the streams over the step boundary."""
        self._carry()
        count = len(self.columns)
        kind, stream, label, micro_batch, latency = (np.array(c) for c in zip(*self.columns, strict=True))
        edge = np.array(self.edges, dtype=np.float64).reshape(-1, 3)
        edge = edge[np.argsort(edge[:, 0], kind="stable")]
        demand = np.array(self.demands, dtype=np.float64).reshape(-1, 3)
        demand = demand[np.argsort(demand[:, 0], kind="stable")]
        carry = np.array(self.carries, dtype=np.float64).reshape(-1, 3)
        program = Program(
            rank_classes=self.classes,
            streams=tuple(self.streams),
            resources=tuple(self.resources),
            labels=tuple(self.labels),
            kind=kind.astype(np.int64),
            stream=stream.astype(np.int64),
            label=label.astype(np.int64),
            micro_batch=micro_batch.astype(np.int64),
            latency_s=latency.astype(np.float64),
            demand_pointer=_pointer(demand[:, 0], count),
            demand_resource=demand[:, 1].astype(np.int64),
            demand_amount=demand[:, 2],
            predecessor_pointer=_pointer(edge[:, 0], count),
            predecessor=edge[:, 1].astype(np.int64),
            predecessor_lag_s=edge[:, 2],
            carry_source=carry[:, 0].astype(np.int64),
            carry_target=carry[:, 1].astype(np.int64),
            carry_lag_s=carry[:, 2],
        )
        program.check()
        return program

    def _carry(self) -> None:
        starts: dict[int, int] = {}
        for index, (_, stream, _, _, _) in enumerate(self.columns):
            starts.setdefault(stream, index)
        self.carries += [(self.last[s], first, 0.0) for s, first in starts.items()]
        for rank_class, (run, lead_s) in self.first.items():
            self.carries.append((self.last[self._stream(rank_class, "host")], run, lead_s))
            self.carries.append((self.last[self._stream(rank_class, "compute")], self._run_ahead_limit(rank_class), 0.0))
        if self.carried >= 0:
            self.carries += [(self.carried, starts[self._stream(i, "compute")], 0.0) for i in range(len(self.classes))]


def _pointer(owner: np.ndarray, count: int) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.bincount(owner.astype(np.int64), minlength=count))]).astype(np.int64)


def _label(workload: Workload, step: Pass) -> str:
    layer = workload.layers[step.kind]
    position = f".{step.layer - sum(x.repeats for x in workload.layers[: step.kind])}" if layer.repeats > 1 else ""
    name = {Mode.FORWARD_DROPPING: "forward", Mode.BACKWARD_ACCUMULATING: "backward"}.get(step.mode, step.mode.value)
    return f"{name} {layer.name}{position}"
