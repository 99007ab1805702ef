"""Collects the terms of a program: kernels on hosts and devices, collectives, sends, and what waits for what.

Terms come one by one or many at once, and not always in the order in which they run: each has a *moment*, the instruction of the schedule
that it belongs to, and a *turn* within it. Whatever follows from the order (what waits on a stream, for its host, for room in the launch
queue) is found at the end, for all terms together. Terms of different instructions that may run at once, and have the same turn, get
numbers next to each other, so that readers can treat them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray, Program, RankClass, Resource, Stream, TermKind
from simtrain.core.runtime import Runtime
from simtrain.cost.collectives import CollectiveCost
from simtrain.step.costs import PassCost

LAST_TURN = 1 << 20
"""Turn of what leaves when an instruction has ended."""


class Shares(NamedTuple):
    """What a term has beside its demands; see `Program`."""

    latency_s: float = 0.0
    recompute_s: float = 0.0
    wire_s: float = 0.0
    memory_s: float = 0.0
    traffic_bytes: float = 0.0

    @classmethod
    def of(cls, cost: PassCost) -> Shares:
        """Those of kernels."""
        return cls(0.0, cost.recompute_s, cost.wire_s, cost.memory_s)


class Table:
    """Rows of numbers, added one by one or many at once; the first has number 0.

    Args:
        kinds: A letter for each column: "i" for whole numbers, "f" for others.
    """

    def __init__(self, kinds: str) -> None:
        self.types = [np.int64 if kind == "i" else np.float64 for kind in kinds]
        self.count = 0
        self.blocks: list[list[NDArray[Any]]] = [[np.zeros(0, dtype=t) for t in self.types]]
        self.rows: list[tuple[float, ...]] = []

    def add(self, *row: float) -> int:
        """Adds a row; returns its number."""
        self.rows.append(row)
        self.count += 1
        return self.count - 1

    def extend(self, *columns: IntArray | FloatArray | float) -> IntArray:
        """Adds as many rows as the longest column has entries; single numbers are repeated. Returns the rows' numbers."""
        self._flush()
        size = max(np.size(column) for column in columns)
        self.blocks.append([np.broadcast_to(np.asarray(c, dtype=t), size) for c, t in zip(columns, self.types, strict=True)])
        self.count += size
        return np.arange(self.count - size, self.count)

    def _flush(self) -> None:
        if self.rows:
            self.blocks.append([np.array(column, dtype=t) for column, t in zip(zip(*self.rows, strict=True), self.types, strict=True)])
            self.rows = []

    def columns(self) -> list[NDArray[Any]]:
        """All rows, column by column."""
        self._flush()
        return [np.concatenate(parts) for parts in zip(*self.blocks, strict=True)]


@dataclass(frozen=True, slots=True)
class Piece:
    """Kernels that follow each other, as one term.

    Attributes:
        kind: What they do.
        label: Their name.
        cost: What they take.
    """

    kind: TermKind
    label: str
    cost: PassCost


NO_SHARES = Shares()


@dataclass
class Builder:
    """Terms as rows; `finish` turns them into a `Program`.

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
    carries: list[tuple[int, int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.has_host = self.runtime.run_ahead_launches > 0
        self.terms = Table("iiiifffffii")  # kind, stream, label, micro-batch, then `Shares`, moment, turn
        self.works = Table("iiiifi")  # lane, term that asks, term that issues, term that runs, lead, launches
        self.demands = Table("iif")  # term, resource, amount
        self.edges = Table("ii")  # term, what it waits for
        self.loads: dict[int, tuple[CollectiveCost | PassCost, IntArray, FloatArray]] = {}
        self.begin(0)
        self.compute = np.array([self.stream((i,), "compute") for i in range(len(self.classes))])
        self.hosts = np.array([self.stream((i,), "host") for i in range(len(self.classes))]) if self.has_host else self.compute
        self.engines = np.array([self.resource(Resource(f"{c.name} compute", 1.0)) for c in self.classes])

    def begin(self, moment: int) -> None:
        """Says which instruction the terms belong to that are added one by one from now on."""
        self.moment = moment
        self.turns: dict[int, int] = {}
        self.latest: dict[int, int] = {}

    def stream(self, rank_classes: Iterable[int], name: str) -> int:
        """Number of a stream, made when first asked for."""
        return self.streams.setdefault(Stream(tuple(rank_classes), name), len(self.streams))

    def resource(self, resource: Resource) -> int:
        """Number of a resource, made when first asked for."""
        return self.resources.setdefault(resource, len(self.resources))

    def label(self, text: str) -> int:
        """Number of a label, made when first asked for."""
        return self.labels.setdefault(text, len(self.labels))

    def wait(self, term: int, earlier: Iterable[int]) -> None:
        """Makes a term wait for others."""
        for other in earlier:
            self.edges.add(term, other)

    def _term(self, kind: TermKind, stream: int, label: str, micro_batch: int, waits: Sequence[int], shares: Shares = NO_SHARES) -> int:
        turn = 1 + max([self.latest.get(stream, -1), *(self.turns.get(w, -1) for w in waits)])
        term = self.terms.add(kind, stream, self.label(label), micro_batch, *shares, self.moment, turn)
        self.turns[term] = self.latest[stream] = turn
        return term

    def work(
        self, lane: int, kind: TermKind, label: str, cost: PassCost, micro_batch: int, waits: Sequence[int] = (), *, sync: bool = False
    ) -> int:
        """Adds kernels: a host term that issues them and a compute term that runs them. Returns the compute term."""
        asks, compute = -1, int(self.compute[lane])
        issues: list[int] = []
        if self.has_host:
            host = int(self.hosts[lane])
            # the host may have to wait for any kernel before these
            self.latest[host] = max(self.latest.get(host, -1), self.latest.get(compute, -1))
            if sync and self.synchronises:
                # the scaler asks whether any reduced gradient overflowed, once the device has come so far
                asks = self._term(TermKind.HOST, host, f"wait before {label}", micro_batch, waits)
                self.wait(asks, waits)
            issues = [self._term(TermKind.HOST, host, f"issue {label}", micro_batch, (), Shares(cost.host_s))]
        run = self._term(kind, compute, label, micro_batch, [*issues, *waits], Shares.of(cost))
        self.works.add(lane, asks, issues[0] if issues else -1, run, cost.lead_s, cost.launches)
        self.demands.add(run, int(self.engines[lane]), cost.device_s)
        if cost.loads:
            self.demands.extend(run, *self._loads(cost))
        self.wait(run, waits)
        return run

    def blocked_host(self, lane: int, label: str, waits: Sequence[int]) -> int:
        """Adds a moment at which a lane's host waits for something, and issues nothing meanwhile; returns it."""
        host = int(self.hosts[lane])
        term = self._term(TermKind.HOST, host, label, -1, waits)
        self.wait(term, waits)
        return term

    def first_work(self, lane: int) -> int:
        """First compute term of a lane."""
        lanes, _, _, runs, *_ = self.works.columns()
        moment, turn = self.terms.columns()[9:]
        own = runs[lanes == lane]
        return int(own[np.lexsort((turn[own], moment[own]))[0]])

    def works_of(
        self, lane: IntArray, pieces: Sequence[Piece], chosen: IntArray, micro_batch: IntArray, moment: IntArray, turn: IntArray
    ) -> IntArray:
        """Adds kernels many times, in order.

        Args:
            lane: Who runs them.
            pieces: What there is to run.
            chosen: Which of them.
            micro_batch: For which micro-batch.
            moment: Instruction that each belongs to.
            turn: How many pieces came before it in this instruction.

        Returns:
            The compute terms.
        """
        kind, label, issued = (
            np.array(column)[chosen]
            for column in zip(
                *((p.kind, self.label(p.label), self.label(f"issue {p.label}") if self.has_host else 0) for p in pieces), strict=True
            )
        )
        costs = np.array([(c.host_s, c.lead_s, c.launches, c.device_s) for c in (p.cost for p in pieces)])
        host_s, lead_s, launches, device_s = costs[chosen].T
        shares = np.array([Shares.of(p.cost) for p in pieces])[chosen].T
        if self.has_host:
            # a host term and its compute term in turn
            both = [(np.full_like(kind, TermKind.HOST), kind), (self.hosts[lane], self.compute[lane]), (issued, label)]
            both += [(micro_batch, micro_batch), (host_s, shares[0]), *((np.zeros(len(share)), share) for share in shares[1:])]
            both += [(moment, moment), (2 * turn, 2 * turn + 1)]
            number = self.terms.extend(*(np.stack(pair, axis=1).ravel() for pair in both))
            issues, run = number[::2], number[1::2]
        else:
            run = self.terms.extend(kind, self.compute[lane], label, micro_batch, *shares, moment, turn)
            issues = np.full(len(run), -1)
        self.works.extend(lane, -1, issues, run, lead_s, launches)
        self.demands.extend(run, self.engines[lane], device_s)
        if any(p.cost.loads for p in pieces):
            self._load(run, [p.cost for p in pieces], chosen)
        return run

    def transfer(self, kind: TermKind, stream: int, label: str, cost: CollectiveCost, waits: Iterable[int], micro_batch: int = -1) -> int:
        """Adds a collective or a send on a stream."""
        waits = list(waits)
        term = self._term(kind, stream, label, micro_batch, waits, Shares(cost.latency_s, traffic_bytes=cost.traffic_bytes))
        if cost.loads:
            self.demands.extend(term, *self._loads(cost))
        self.wait(term, waits)
        return term

    def _load(self, terms: IntArray, costs: Sequence[CollectiveCost | PassCost], chosen: IntArray) -> None:
        """Adds what terms demand of links."""
        loads = [self._loads(cost) for cost in costs]
        first = np.concatenate([[0], np.cumsum([len(load) for load, _ in loads])])
        resource, amount = (np.concatenate(column) for column in zip(*loads, strict=True))
        count = np.diff(first)[chosen]
        row = np.arange(count.sum()) + np.repeat(first[chosen] - (np.cumsum(count) - count), count)
        self.demands.extend(np.repeat(terms, count), resource[row], amount[row])

    def _loads(self, cost: CollectiveCost | PassCost) -> tuple[IntArray, FloatArray]:
        """Links that a transfer, or the collectives inside a pass, demand, and how much of each."""
        if id(cost) not in self.loads:  # costs are shared by all transfers that are alike
            resources = np.array([self.resource(r) for r in cost.loads], dtype=np.int64)
            self.loads[id(cost)] = (cost, resources, np.array(list(cost.loads.values()), dtype=np.float64))
        return self.loads[id(cost)][1:]

    def sends_of(
        self, sends: Sequence[tuple[int, str, CollectiveCost]], chosen: IntArray, waits: IntArray, micro_batch: IntArray, moment: IntArray
    ) -> IntArray:
        """Adds sends many times, in order.

        Args:
            sends: Stream, label and cost of what there is to send.
            chosen: Which of them.
            waits: The term that makes what is sent.
            micro_batch: Of which micro-batch.
            moment: Instruction that each belongs to.

        Returns:
            The terms.
        """
        head = np.array([(stream, self.label(label), cost.latency_s, cost.traffic_bytes) for stream, label, cost in sends])[chosen].T
        sent = self.terms.extend(TermKind.SEND, head[0], head[1], micro_batch, head[2], 0.0, 0.0, 0.0, head[3], moment, LAST_TURN)
        self.edges.extend(sent, waits)
        self._load(sent, [cost for _, _, cost in sends], chosen)
        return sent

    def finish(self, level: IntArray) -> tuple[Program, IntArray]:
        """Puts terms in order, finds what waits for what and closes the streams over the step boundary.

        Args:
            level: Of each moment: those that are equal are independent.

        Returns:
            The program, and the number in it of each term that was added.
        """
        terms = self.terms.columns()
        moment, turn = terms[9:]
        order = np.argsort((level[moment] * (LAST_TURN + 1) + turn) * len(level) + moment, kind="stable")
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        kind, stream, label, micro_batch, latency, recompute, wire, memory, traffic = (column[order] for column in terms[:9])
        before = _before(stream)
        explicit = [number[column] for column in self.edges.columns()]
        waits, carries = self._launched(number, before)
        followers = np.flatnonzero(before >= 0)
        owner, source, lag = (
            np.concatenate(parts)
            for parts in zip(
                (followers, before[followers], np.zeros(len(followers))), *waits, (*explicit, np.zeros(len(explicit[0]))), strict=True
            )
        )
        edge = np.argsort(owner, kind="stable")
        demand_term, demand_resource, amount = self.demands.columns()
        demand_term = number[demand_term]
        demand = np.argsort(demand_term, kind="stable")
        first, last = _ends(stream)
        passed = [(int(number[a]), int(number[b]), lag_s) for a, b, lag_s in self.carries]
        carry = np.array([*passed, *zip(last.tolist(), first.tolist(), np.zeros(len(first)), strict=True), *carries]).reshape(-1, 3)
        program = Program(
            rank_classes=self.classes,
            streams=tuple(self.streams),
            resources=tuple(self.resources),
            labels=tuple(self.labels),
            kind=kind,
            stream=stream,
            label=label,
            micro_batch=micro_batch,
            recompute_s=recompute,
            wire_s=wire,
            memory_s=memory,
            traffic_bytes=traffic,
            latency_s=latency,
            demand_pointer=_pointer(demand_term, len(order)),
            demand_resource=demand_resource[demand],
            demand_amount=amount[demand],
            predecessor_pointer=_pointer(owner, len(order)),
            predecessor=source[edge],
            predecessor_lag_s=lag[edge],
            carry_source=carry[:, 0].astype(np.int64),
            carry_target=carry[:, 1].astype(np.int64),
            carry_lag_s=carry[:, 2],
        )
        program.check()
        return program, number

    def _launched(
        self, number: IntArray, before: IntArray
    ) -> tuple[list[tuple[IntArray, IntArray, FloatArray]], list[tuple[int, int, float]]]:
        """What kernels and hosts wait for: terms, predecessors and lags; and what they wait for in the step before."""
        waits: list[tuple[IntArray, IntArray, FloatArray]] = []
        carries: list[tuple[int, int, float]] = []
        if not self.has_host:
            return waits, carries
        rows = self.works.columns()
        order = np.argsort(number[rows[3]], kind="stable")
        lanes, asks, issues, runs, lead_s, launches = (row[order] for row in rows)
        asks, issues, runs = (np.where(row >= 0, number[row], -1) for row in (asks, issues, runs))
        asking = asks >= 0
        waits.append((asks[asking], before[runs[asking]], np.zeros(int(asking.sum()))))
        led = before[issues] >= 0
        waits.append((runs[led], before[issues[led]], lead_s[led]))
        for lane in range(len(self.classes)):
            own = np.flatnonzero(lanes == lane)
            if not len(own):
                continue
            issued = np.cumsum(launches[own])
            # the host waits for the kernels that must have run before there is room for these
            room = np.searchsorted(issued, issued - self.runtime.run_ahead_launches)
            full = np.flatnonzero(room)
            waits.append((issues[own[full]], runs[own[room[full] - 1]], np.zeros(len(full))))
            if not led[own[0]]:
                carries.append((int(issues[own[-1]]), int(runs[own[0]]), float(lead_s[own[0]])))
            # the device must have finished the step before when the queue is full for the first time (at most one step ahead)
            limit = min(int(np.searchsorted(issued, self.runtime.run_ahead_launches, side="right")), len(own) - 1)
            carries.append((int(runs[own[-1]]), int(issues[own[limit]]), 0.0))
        return waits, carries


def _before(stream: IntArray) -> IntArray:
    """The term before each on its stream, -1 for none."""
    order = np.argsort(
        stream.astype(np.uint16) if len(stream) and stream.max() < 2**16 else stream, kind="stable"
    )  # short ones sort faster
    same = stream[order[1:]] == stream[order[:-1]]
    before = np.full(len(stream), -1)
    before[order[1:][same]] = order[:-1][same]
    return before


def _ends(stream: IntArray) -> tuple[IntArray, IntArray]:
    """First and last term of each stream that has any."""
    first = np.unique(stream, return_index=True)[1]
    last = len(stream) - 1 - np.unique(stream[::-1], return_index=True)[1]
    return first, last


def _pointer(owner: IntArray, count: int) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))]).astype(np.int64)
