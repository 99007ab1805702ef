"""Collects the terms of a program: kernels on hosts and devices, collectives, sends, and what waits for what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from simtrain.core.program import IntArray, Program, RankClass, Resource, Stream, TermKind
from simtrain.core.runtime import Runtime
from simtrain.cost.collectives import CollectiveCost
from simtrain.step.costs import PassCost

Shares = tuple[float, float]


@dataclass
class Builder:
    """Terms as columns; `finish` turns them into a `Program`.

    Attributes:
        runtime: What launches kernels.
        classes: Who executes.
        synchronises: Whether the host asks for the result of the reduction before it issues the update (loss scaling).
    """

    runtime: Runtime
    classes: tuple[RankClass, ...]
    synchronises: bool
    streams: dict[Stream, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    resources: dict[Resource, int] = field(default_factory=dict)
    columns: list[tuple[int, int, int, int, float, float, float]] = field(default_factory=list)
    demands: list[tuple[int, int, float]] = field(default_factory=list)
    edges: list[tuple[int, int, float]] = field(default_factory=list)
    carries: list[tuple[int, int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.has_host = self.runtime.run_ahead_launches > 0
        self.last: dict[int, int] = {}
        self.first: dict[int, tuple[int, float]] = {}
        self.launches: list[list[tuple[int, int, int]]] = [[] for _ in self.classes]
        self.issued, self.oldest = [0] * len(self.classes), [0] * len(self.classes)
        self.compute = [self.stream((i,), "compute") for i in range(len(self.classes))]
        self.hosts = [self.stream((i,), "host") for i in range(len(self.classes))] if self.has_host else []
        self.engines = [Resource(f"{c.name} compute", 1.0) for c in self.classes]

    def stream(self, rank_classes: Iterable[int], name: str) -> int:
        """Number of a stream, made when first asked for."""
        return self.streams.setdefault(Stream(tuple(rank_classes), name), len(self.streams))

    def _term(self, kind: TermKind, stream: int, label: str, micro_batch: int, latency_s: float = 0.0, shares: Shares = (0.0, 0.0)) -> int:
        index = len(self.columns)
        self.columns.append((kind, stream, self.labels.setdefault(label, len(self.labels)), micro_batch, latency_s, *shares))
        if stream in self.last:
            self.edges.append((index, self.last[stream], 0.0))
        self.last[stream] = index
        return index

    def wait(self, term: int, earlier: Iterable[int]) -> None:
        """Makes a term wait for others."""
        self.edges += [(term, w, 0.0) for w in earlier]

    def work(
        self, lane: int, kind: TermKind, label: str, cost: PassCost, micro_batch: int, waits: Sequence[int] = (), *, sync: bool = False
    ) -> int:
        """Adds kernels: a host term that issues them and a compute term that runs them. Returns the compute term."""
        compute, shares = self.compute[lane], (cost.recompute_s, cost.wire_s)
        if self.has_host:
            host = self.hosts[lane]
            if sync and self.synchronises:
                # the scaler asks whether any reduced gradient overflowed
                asked = self._term(TermKind.HOST, host, f"wait before {label}", micro_batch)
                self.wait(asked, (self.last[compute], *waits))
            before = self.last.get(host)
            issue = self._term(TermKind.HOST, host, f"issue {label}", micro_batch, cost.host_s)
            self._bound_run_ahead(lane, issue, cost.launches)
            run = self._term(kind, compute, label, micro_batch, shares=shares)
            if before is None:
                self.first[lane] = (run, cost.lead_s)
            else:
                self.edges.append((run, before, cost.lead_s))
            self.issued[lane] += cost.launches
            self.launches[lane].append((issue, run, self.issued[lane]))
        else:
            run = self._term(kind, compute, label, micro_batch, shares=shares)
        self.demands.append((run, self.resources.setdefault(self.engines[lane], len(self.resources)), cost.device_s))
        self.wait(run, waits)
        return run

    def _bound_run_ahead(self, lane: int, issue: int, launches: int) -> None:
        """Makes the host wait for the kernels that must have run before there is room for these."""
        queue, behind = self.launches[lane], self.issued[lane] + launches - self.runtime.run_ahead_launches
        at = self.oldest[lane]
        while at < len(queue) and queue[at][2] < behind:
            at += 1
        self.oldest[lane] = at
        if at:
            self.edges.append((issue, queue[at - 1][1], 0.0))

    def _run_ahead_limit(self, lane: int) -> int:
        """Host term that must not be issued before the device has finished the step before (at most one step ahead)."""
        for issue, _, issued in self.launches[lane]:
            if issued > self.runtime.run_ahead_launches:
                return issue
        return self.launches[lane][-1][0]

    def transfer(self, kind: TermKind, stream: int, label: str, cost: CollectiveCost, waits: Iterable[int], micro_batch: int = -1) -> int:
        """Adds a collective or a send on a stream."""
        term = self._term(kind, stream, label, micro_batch, cost.latency_s)
        for resource, amount in cost.loads.items():
            self.demands.append((term, self.resources.setdefault(resource, len(self.resources)), amount))
        self.wait(term, waits)
        return term

    def finish(self) -> Program:
        """Sorts edges and demands into CSR form and closes the streams over the step boundary."""
        self._carry()
        count = len(self.columns)
        kind, stream, label, micro_batch, latency, recompute, wire = (np.array(c) for c in zip(*self.columns, strict=True))
        edge, demand = _sorted(self.edges), _sorted(self.demands)
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
            recompute_s=recompute.astype(np.float64),
            wire_s=wire.astype(np.float64),
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
        for index, column in enumerate(self.columns):
            starts.setdefault(column[1], index)
        self.carries += [(self.last[s], first, 0.0) for s, first in starts.items()]
        for lane, (run, lead_s) in self.first.items():
            self.carries.append((self.last[self.hosts[lane]], run, lead_s))
            self.carries.append((self.last[self.compute[lane]], self._run_ahead_limit(lane), 0.0))


def _sorted(entries: list[tuple[int, int, float]]) -> np.ndarray:
    rows = np.array(entries, dtype=np.float64).reshape(-1, 3)
    return rows[np.argsort(rows[:, 0], kind="stable")]


def _pointer(owner: np.ndarray, count: int) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.bincount(owner.astype(np.int64), minlength=count))]).astype(np.int64)
