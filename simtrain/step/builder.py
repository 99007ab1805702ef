"""Collects the terms of a program: kernels on hosts and devices, collectives, sends, and what waits for what.

Most terms repeat what another micro-batch does: what they have in common is a *pattern*, written down once, and a term is a pattern, a
micro-batch and a moment. Terms come one by one or many at once, and not always in the order in which they run: each has a *moment*, the
instruction of the schedule that it belongs to, and a *turn* within it. Whatever follows from the order (what waits on a stream, for its
host, for room in the launch queue) is found at the end, for all terms together (`simtrain.step.waits`). Terms of different instructions
that may run at once, and have the same turn, get numbers next to each other, so that readers can treat them together.
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
from simtrain.cost.collectives import CollectiveCost, Loads
from simtrain.step.costs import PassCost
from simtrain.step.waits import Carry, Waits, Works, joined, launched, led, on_streams, pointer_of

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
    """Patterns and terms as rows; `finish` turns them into a `Program`.

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
        self.has_host = self.runtime.host.run_ahead_launches > 0
        self.patterns = Table("iiifffffi")  # kind, stream, label, then `Shares`, turn
        self.terms = Table("iii")  # pattern, micro-batch, moment
        self.works = Table("iiifii")  # see `Works`
        self.asks = Table("ii")  # term in which a host waits for a result, term that runs what it issues then
        self.demands = Table("iif")  # pattern, resource, amount
        self.edges = Table("ii")  # term, what it waits for
        self.loads: dict[int, tuple[CollectiveCost | PassCost, IntArray, FloatArray]] = {}
        self.links: dict[int, tuple[tuple[Resource, ...], IntArray]] = {}
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
        pattern = self.patterns.add(kind, stream, self.label(label), *shares, turn)
        term = self.terms.add(pattern, micro_batch, self.moment)
        self.turns[term] = self.latest[stream] = turn
        return term

    def work(
        self,
        lane: int,
        kind: TermKind,
        label: str,
        cost: PassCost,
        micro_batch: int,
        waits: Sequence[int] = (),
        *,
        sync: bool = False,
        passes: int = 0,
    ) -> int:
        """Adds kernels: a host term that issues them and a compute term that runs them. Returns the compute term.

        Args:
            lane: Who runs them.
            kind: What they do.
            label: Their name.
            cost: What they take.
            micro_batch: For which micro-batch (-1 for none).
            waits: Terms that must end first.
            sync: Whether the host waits too, if it `synchronises`.
            passes: How many passes through layers they are.
        """
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
        self.works.add(lane, issues[0] if issues else run, run, cost.lead_s, cost.launches, passes)
        if asks >= 0:
            self.asks.add(asks, run)
        self.demands.add(self.patterns.count - 1, int(self.engines[lane]), cost.device_s)
        if cost.loads:
            self.demands.extend(self.patterns.count - 1, *self._loads(cost))
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
        lanes, _, runs, *_ = self.works.columns()
        pattern, _, moment = self.terms.columns()
        own = runs[lanes == lane]
        return int(own[np.lexsort((self.patterns.columns()[-1][pattern[own]], moment[own]))[0]])

    def works_of(
        self, pieces: Sequence[tuple[int, int, Piece]], chosen: IntArray, micro_batch: IntArray, moment: IntArray, passes: IntArray
    ) -> IntArray:
        """Adds kernels many times, in order.

        Args:
            pieces: What there is to run, each with its lane and how many pieces come before it in its instruction.
            chosen: Which of them.
            micro_batch: For which micro-batch.
            moment: Instruction that each belongs to.
            passes: Of each piece.

        Returns:
            The compute terms.
        """
        costs, lane = [p.cost for _, _, p in pieces], np.array([own for own, _, _ in pieces])
        compute, hosts = self.compute.tolist(), self.hosts.tolist()
        rows: list[tuple[float, ...]] = []
        for own, turn, p in pieces:
            label = self.label(p.label)
            if self.has_host:
                rows.append((TermKind.HOST, hosts[own], self.label(f"issue {p.label}"), *Shares(p.cost.host_s), 2 * turn))
            rows.append((p.kind, compute[own], label, *Shares.of(p.cost), 2 * turn + 1 if self.has_host else turn))
        pattern = self.patterns.extend(*np.array(rows).T)
        if self.has_host:
            # a host term and its compute term in turn
            both = pattern.reshape(-1, 2)[chosen].ravel()
            number = self.terms.extend(both, np.repeat(micro_batch, 2), np.repeat(moment, 2))
            issues, run, pattern = number[::2], number[1::2], pattern[1::2]
        else:
            run = self.terms.extend(pattern[chosen], micro_batch, moment)
            issues = run
        lead_s, launches, device_s = (np.array(column) for column in zip(*((c.lead_s, c.launches, c.device_s) for c in costs), strict=True))
        self.works.extend(lane[chosen], issues, run, lead_s[chosen], launches[chosen], passes[chosen])
        self.demands.extend(pattern, self.engines[lane], device_s)
        self._load(pattern, costs)
        return run

    def transfer(self, kind: TermKind, stream: int, label: str, cost: CollectiveCost, waits: Iterable[int], micro_batch: int = -1) -> int:
        """Adds a collective or a send on a stream."""
        waits = list(waits)
        term = self._term(kind, stream, label, micro_batch, waits, Shares(cost.latency_s, traffic_bytes=cost.traffic_bytes))
        if cost.loads:
            self.demands.extend(self.patterns.count - 1, *self._loads(cost))
        self.wait(term, waits)
        return term

    def _load(self, patterns: IntArray, costs: Sequence[CollectiveCost | PassCost]) -> None:
        """Adds what patterns demand of links."""
        found = [(pattern, *self._loads(cost)) for pattern, cost in zip(patterns, costs, strict=True) if cost.loads]
        if found:
            owner, resource, amount = zip(*found, strict=True)
            self.demands.extend(np.repeat(owner, [len(own) for own in resource]), np.concatenate(resource), np.concatenate(amount))

    def _loads(self, cost: CollectiveCost | PassCost) -> tuple[IntArray, FloatArray]:
        """Links that a transfer, or the collectives inside a pass, demand, and how much of each."""
        if id(cost) not in self.loads:  # costs are shared by all transfers that are alike
            loads = cost.loads
            if isinstance(loads, Loads):
                self.loads[id(cost)] = (cost, self._links(loads.resources), loads.amounts)
            else:
                self.loads[id(cost)] = (cost, self._links(tuple(loads)), np.array(list(loads.values()), dtype=np.float64))
        return self.loads[id(cost)][1:]

    def _links(self, resources: tuple[Resource, ...]) -> IntArray:
        """Their numbers; thousands of ranks use thousands of links, again and again."""
        if id(resources) not in self.links:
            self.links[id(resources)] = (resources, np.array([self.resource(r) for r in resources], dtype=np.int64))
        return self.links[id(resources)][1]

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
        rows = [
            (TermKind.SEND, stream, self.label(label), *Shares(cost.latency_s, traffic_bytes=cost.traffic_bytes), LAST_TURN)
            for stream, label, cost in sends
        ]
        pattern = self.patterns.extend(*np.array(rows).T)
        sent = self.terms.extend(pattern[chosen], micro_batch, moment)
        self.edges.extend(sent, waits)
        self._load(pattern, [cost for _, _, cost in sends])
        return sent

    def finish(self, level: IntArray) -> tuple[Program, IntArray, Works]:
        """Puts terms in order, finds what waits for what and closes the streams over the step boundary.

        Args:
            level: Of each moment: those that are equal are independent.

        Returns:
            The program, the number in it of each term that was added, and kernels in the order in which lanes run them.
        """
        pattern, micro_batch, moment = self.terms.columns()
        *shared, turn = self.patterns.columns()
        order = np.argsort((level[moment] * (LAST_TURN + 1) + turn[pattern]) * len(level) + moment, kind="stable")
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        pattern = pattern[order]
        kind, stream, label, latency, recompute, wire, memory, traffic = (column[pattern] for column in shared)
        before, first, last = on_streams(stream)
        works = Works(*self.works.columns()).numbered(number)
        by_lane = works.by_lane(len(number))
        asks, runs, owner, source = (number[column] for column in (*self.asks.columns(), *self.edges.columns()))
        waits: list[Waits] = [(asks, before[runs], None)]
        carries: list[Carry] = []
        if self.has_host:
            full, carries = launched(by_lane, before, len(self.classes), self.runtime.host.run_ahead_launches)
            waits += [led(works, before), full]
        predecessor_pointer, predecessor, lag_s = joined(before, waits, owner, source)
        demand_pointer, demand = self._demanded(pattern)
        _, resource, amount = self.demands.columns()
        passed = [(int(number[a]), int(number[b]), lag) for a, b, lag in self.carries]
        carry = np.array([*passed, *zip(last.tolist(), first.tolist(), np.zeros(len(first)), strict=True), *carries]).reshape(-1, 3)
        program = Program(
            rank_classes=self.classes,
            streams=tuple(self.streams),
            resources=tuple(self.resources),
            labels=tuple(self.labels),
            kind=kind,
            stream=stream,
            label=label,
            micro_batch=micro_batch[order],
            recompute_s=recompute,
            wire_s=wire,
            memory_s=memory,
            traffic_bytes=traffic,
            latency_s=latency,
            demand_pointer=demand_pointer,
            demand_resource=resource[demand],
            demand_amount=amount[demand],
            predecessor_pointer=predecessor_pointer,
            predecessor=predecessor,
            predecessor_lag_s=lag_s,
            carry_source=carry[:, 0].astype(np.int64),
            carry_target=carry[:, 1].astype(np.int64),
            carry_lag_s=carry[:, 2],
        )
        program.check()
        return program, number, by_lane

    def _demanded(self, pattern: IntArray) -> tuple[IntArray, IntArray]:
        """CSR pointer and rows of the table of demands, for terms of these patterns."""
        owner = self.demands.columns()[0]
        rows = np.argsort(owner, kind="stable")
        own = np.bincount(owner, minlength=self.patterns.count)
        first, count = np.cumsum(own) - own, own[pattern]
        pointer = pointer_of(count)
        return pointer, rows[np.repeat(first[pattern] - pointer[:-1], count) + np.arange(pointer[-1])]
