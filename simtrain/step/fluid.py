"""What runs beside others: transfers that share links, computation that shares its device with collectives.

Transfers run at their max-min fair rates, which change whenever one of those they meet begins or ends. Computation goes on at what
collectives leave of the multiprocessors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import simpy

from simtrain.core.program import Program, TermKind
from simtrain.cost.sharing import max_min_rates
from simtrain.step.meeting import Meeting


@dataclass(slots=True)
class _Flow:
    term: int
    left: float
    rate: float
    since: float
    turn: int


class FluidPool:
    """Flows under way, with what they demand of which resources.

    Only the flows that are connected to a change, directly or over others, get new rates.

    Args:
        env: The simulation.
        program: Whose terms flow.
        meeting: What they may meet on.
        done: Called with the number of a flow that has ended.
    """

    def __init__(self, env: simpy.Environment, program: Program, meeting: Meeting, done: Callable[[int], None]) -> None:
        self.env, self.program, self.done = env, program, done
        self.flows: dict[int, _Flow] = {}
        self.users: dict[int, set[int]] = {}
        # numbered anew without those that nobody can meet on
        used, numbers = np.unique(meeting.used, return_inverse=True)
        self.capacity = np.array([r.capacity for r in program.resources])[used]
        pointer = np.searchsorted(meeting.user, np.arange(len(program) + 1)).tolist()
        links, amounts = numbers.tolist(), meeting.amount.tolist()
        self.resources: list[list[int]] = [links[a:b] for a, b in pairwise(pointer)]
        self.amounts: list[list[float]] = [amounts[a:b] for a, b in pairwise(pointer)]
        self.alone: list[float] = (program.durations_s() - program.latency_s).tolist()
        # fair is what each gets on its busiest link, whether others can be met there or not
        owner = np.repeat(np.arange(len(program)), np.diff(program.demand_pointer))
        self.largest = np.zeros(len(program))
        np.maximum.at(self.largest, owner, program.demand_amount)

    def shares(self, term: int) -> bool:
        """Whether a term may meet others."""
        return bool(self.resources[term])

    def start(self, number: int) -> None:
        """Begins a flow."""
        term = number % len(self.program)
        if self.alone[term] <= 0:
            self.done(number)
            return
        self.flows[number] = _Flow(term, 1.0, 0.0, self.env.now, 0)
        met = False
        for resource in self.resources[term]:
            users = self.users.setdefault(resource, set())
            met = met or bool(users)
            users.add(number)
        self._share(self._connected(number) if met else {number})

    def _ended(self, number: int, turn: int, _: simpy.Event) -> None:
        flow = self.flows.get(number)
        if flow is None or flow.turn != turn:
            return  # its rate has changed since
        met = self._connected(number)
        met.discard(number)
        del self.flows[number]
        for resource in self.resources[flow.term]:
            self.users[resource].discard(number)
        self.done(number)
        if met:
            self._share({k for k in met if k in self.flows})

    def _connected(self, number: int) -> set[int]:
        found, edge = {number}, [number]
        while edge:
            for resource in self.resources[self.flows[edge.pop()].term]:
                users = self.users[resource]
                if len(users) > 1:
                    new = users - found
                    found |= new
                    edge += new
        return found

    def _share(self, numbers: set[int]) -> None:
        """Gives connected flows the rates that are fair now."""
        order, now = sorted(numbers), self.env.now
        for number, rate in zip(order, self._rates(order), strict=True):
            flow = self.flows[number]
            flow.left -= flow.rate * (now - flow.since)
            flow.since, flow.rate, flow.turn = now, rate, flow.turn + 1
            event = self.env.timeout(max(flow.left, 0.0) / rate)
            event.callbacks.append(partial(self._ended, number, flow.turn))

    def _rates(self, numbers: list[int]) -> list[float]:
        terms = [self.flows[number].term for number in numbers]
        if len(terms) <= 1:
            return [1.0 / self.alone[term] for term in terms]
        from scipy.sparse import csr_array

        # beside the shared links, one that is each flow's own: it carries the largest of its demands in the time that it takes alone
        count, links = len(terms), len(self.capacity)
        used = [[*self.resources[term], links + i] for i, term in enumerate(terms)]
        own = self.largest[terms]
        data = np.concatenate([[*self.amounts[term], most] for term, most in zip(terms, own.tolist(), strict=True)])
        pointer = np.concatenate([[0], np.cumsum([len(u) for u in used])])
        demand = csr_array((data, np.concatenate(used), pointer), shape=(count, links + count))
        capacity = np.concatenate([self.capacity, own / [self.alone[term] for term in terms]])
        return [float(rate) for rate in max_min_rates(demand, capacity, np.full(count, np.inf))]


@dataclass(slots=True)
class _Work:
    number: int
    left_s: float
    since: float
    rate: float
    turn: int


class Engines:
    """What each class of ranks computes, slowed while collectives run on the same devices.

    Args:
        env: The simulation.
        program: Whose terms are executed.
        share: Of a device that collectives take.
        done: Called with the number of a term that has ended.
    """

    def __init__(self, env: simpy.Environment, program: Program, share: float, done: Callable[[int], None]) -> None:
        self.env, self.share, self.done = env, share, done
        names, self.stream = [s.name for s in program.streams], program.stream.tolist()
        contended = share > 0 and bool(np.any(program.kind == TermKind.COLLECTIVE))
        self.lane = [s.rank_classes[0] if name == "compute" and contended else -1 for s, name in zip(program.streams, names, strict=True)]
        moving = np.unique(program.stream[program.kind == TermKind.COLLECTIVE]).tolist() if contended else []
        self.met = {i: program.streams[i].rank_classes for i in moving}
        self.active = [0] * len(program.rank_classes)
        self.running: dict[int, _Work] = {}
        self.turn = 0

    def computes(self, term: int) -> bool:
        """Whether a term is computation that collectives can slow."""
        return bool(self.lane[self.stream[term]] >= 0)

    def concerns(self, term: int) -> bool:
        """Whether a term is slowed by others or slows them."""
        return self.computes(term) or self.stream[term] in self.met

    def start(self, number: int, term: int, duration_s: float) -> None:
        """Begins to compute a term."""
        lane = self.lane[self.stream[term]]
        self.running[lane] = _Work(number, duration_s, self.env.now, 1.0, 0)
        self._pace(lane)

    def meet(self, term: int, change: int) -> None:
        """Notes that a collective begins (1) or ends (-1)."""
        for lane in self.met.get(self.stream[term], ()):
            before = self.active[lane]
            self.active[lane] += change
            if lane in self.running and (before == 0) != (self.active[lane] == 0):
                self._pace(lane)

    def _pace(self, lane: int) -> None:
        work = self.running[lane]
        work.left_s -= work.rate * (self.env.now - work.since)
        # a share of the time beside collectives is lost
        work.since, work.rate = self.env.now, 1.0 - self.share if self.active[lane] else 1.0
        self.turn += 1
        work.turn = self.turn
        self.env.timeout(max(work.left_s, 0.0) / work.rate).callbacks.append(partial(self._ended, lane, work.turn))

    def _ended(self, lane: int, turn: int, _: simpy.Event) -> None:
        work = self.running.get(lane)
        if work is not None and work.turn == turn:
            del self.running[lane]
            self.done(work.number)
