"""What runs beside others: transfers that share links, computation that shares its device with collectives.

Transfers run at their max-min fair rates, which change whenever one of those they meet begins or ends. Computation goes on at what
collectives leave of the multiprocessors and of the memory. A pass in which ranks exchange something is a transfer too, no faster than
computation allows; what it sends is spread evenly over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import simpy

from simtrain.core.program import Program
from simtrain.cost.sharing import max_min_rates
from simtrain.step.meeting import Meeting


@dataclass(slots=True)
class _Flow:
    term: int
    most: float
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
        # fair is what each gets on its busiest link, whether others can be met there or not
        owner = np.repeat(np.arange(len(program)), np.diff(program.demand_pointer))
        self.largest = np.zeros(len(program))
        np.maximum.at(self.largest, owner, program.demand_amount)

    def shares(self, term: int) -> bool:
        """Whether a term may meet others."""
        return bool(self.resources[term])

    def start(self, number: int, alone_s: float, pace: float = 1.0) -> None:
        """Begins a flow.

        Args:
            number: Of its term.
            alone_s: What it takes if it meets nobody.
            pace: Share of its full rate that it cannot exceed.
        """
        term = number % len(self.program)
        if alone_s <= 0:
            self.done(number)
            return
        self.flows[number] = _Flow(term, pace / alone_s, 1.0, 0.0, self.env.now, 0)
        met = False
        for resource in self.resources[term]:
            users = self.users.setdefault(resource, set())
            met = met or bool(users)
            users.add(number)
        self._share(self._connected(number) if met else {number})

    def limit(self, number: int, alone_s: float, pace: float) -> None:
        """Changes what a flow cannot exceed."""
        self.flows[number].most = pace / alone_s
        self._share(self._connected(number))

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
        flows = [self.flows[number] for number in numbers]
        if len(flows) <= 1:
            return [flow.most for flow in flows]
        from scipy.sparse import csr_array

        # beside the shared links, one that is each flow's own: it carries the largest of its demands at the most that it can
        count, links = len(flows), len(self.capacity)
        used = [[*self.resources[flow.term], links + i] for i, flow in enumerate(flows)]
        own = self.largest[[flow.term for flow in flows]]
        data = np.concatenate([[*self.amounts[flow.term], most] for flow, most in zip(flows, own.tolist(), strict=True)])
        pointer = np.concatenate([[0], np.cumsum([len(u) for u in used])])
        demand = csr_array((data, np.concatenate(used), pointer), shape=(count, links + count))
        capacity = np.concatenate([self.capacity, own * [flow.most for flow in flows]])
        return [float(rate) for rate in max_min_rates(demand, capacity, np.full(count, np.inf))]


@dataclass(slots=True)
class _Work:
    number: int
    term: int
    alone_s: float
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
        meeting: Who competes for devices.
        pool: What exchanges something while it computes.
        done: Called with the number of a term that has ended.
    """

    def __init__(
        self, env: simpy.Environment, program: Program, share: float, meeting: Meeting, pool: FluidPool, done: Callable[[int], None]
    ) -> None:
        self.env, self.share, self.pool, self.done = env, share, pool, done
        self.lane: dict[int, int] = {}
        self.met: dict[int, tuple[int, ...]] = {}
        self.lost: dict[int, float] = {}
        self.hungry: set[int] = set()
        for own in meeting.rivals:
            self.lane.update(dict.fromkeys(own.working.tolist(), own.lane))
            self.lost.update(zip(own.working.tolist(), own.lost.tolist(), strict=True))
            self.met.update({term: program.streams[program.stream[term]].rank_classes for term in own.moving.tolist()})
            self.hungry.update(own.hungry.tolist())
        # collectives under way beside each class, and the hungry ones among them
        self.active = [[0, 0] for _ in program.rank_classes]
        self.running: dict[int, _Work] = {}
        self.turn = 0

    def computes(self, term: int) -> bool:
        """Whether a term is computation that collectives can slow."""
        return term in self.lane

    def start(self, number: int, term: int, duration_s: float) -> None:
        """Begins to compute a term."""
        lane = self.lane[term]
        self.running[lane] = _Work(number, term, duration_s, duration_s, self.env.now, 1.0, 0)
        if self.pool.shares(term):
            self.pool.start(number, duration_s, self._rate(lane))
        else:
            self._pace(lane)

    def end(self, term: int) -> None:
        """Notes that a term has ended."""
        if term in self.lane:
            self.running.pop(self.lane[term], None)
        else:
            self.meet(term, -1)

    def meet(self, term: int, change: int) -> None:
        """Notes that a collective begins (1) or ends (-1)."""
        for lane in self.met.get(term, ()):
            before = self._rate(lane)
            self.active[lane][0] += change
            self.active[lane][1] += change * (term in self.hungry)
            if lane in self.running and self._rate(lane) != before:
                self._pace(lane)

    def _rate(self, lane: int) -> float:
        """What collectives leave of a device to what it computes."""
        every, hungry = self.active[lane]
        work = self.running.get(lane)
        return 1.0 - (self.share if every else 0.0) - (self.lost[work.term] if hungry and work else 0.0)

    def _pace(self, lane: int) -> None:
        work = self.running[lane]
        if self.pool.shares(work.term):
            self.pool.limit(work.number, work.alone_s, self._rate(lane))
            return
        work.left_s -= work.rate * (self.env.now - work.since)
        work.since, work.rate = self.env.now, self._rate(lane)
        self.turn += 1
        work.turn = self.turn
        self.env.timeout(max(work.left_s, 0.0) / work.rate).callbacks.append(partial(self._ended, lane, work.turn))

    def _ended(self, lane: int, turn: int, _: simpy.Event) -> None:
        work = self.running.get(lane)
        if work is not None and work.turn == turn:
            self.done(work.number)
