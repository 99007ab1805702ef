"""`simulate`: the program as a discrete-event simulation in SimPy, with disturbances.

Where nothing contends it must agree with `schedule` (tests hold it to 1e-9): both read one program, one through a recursion, the other
through events. Transfers of different streams that meet on a link share it fairly (`simtrain.step.fluid`).
Stragglers slow a rank's compute by a constant factor; jitter draws a factor for every rank and step.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import cast

import numpy as np
import simpy

from simtrain.core.errors import InputError, InternalError, UnsupportedError
from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray, Program, TermKind
from simtrain.core.result import Result
from simtrain.step.breakdown import PARTS, breakdown, busy_s
from simtrain.step.fluid import Engines, FluidPool, shared_terms
from simtrain.step.lower import lower
from simtrain.step.results import assemble, by_rank
from simtrain.step.schedule import first_compute_s, slowest_class, timed_memory, trace_events
from simtrain.step.setting import Setting

WARM_UP_STEPS = 3
STEADY_STEPS = 2
DISTURBED_STEPS = 20
MAX_SPLIT_RANKS = 1024


class _Run:
    """State of a simulation: for every term of every step how many it still waits for, and when it could begin at the earliest.

    A term of a step has the number `step * terms + term`; everything is kept in flat lists. What others can slow (computation beside
    collectives, transfers that share links) is an event when it begins and when it ends. Anything else ends at a time that is known as
    soon as its last predecessor has ended, so it is passed on at once: the event queue holds only what may change.
    """

    def __init__(self, program: Program, factors: FloatArray, share: float) -> None:
        self.program, self.terms = program, len(program)
        steps = factors.shape[0]
        needed = np.diff(program.predecessor_pointer)
        carried = np.bincount(program.carry_target, minlength=self.terms)
        self.waiting: list[int] = np.concatenate([needed, *[needed + carried] * (steps - 1)]).tolist()
        self.durations: list[float] = (program.durations_s() * factors).ravel().tolist()
        self.earliest = [0.0] * (steps * self.terms)
        self.started = [np.nan] * (steps * self.terms)
        self.ended = [np.nan] * (steps * self.terms)
        owner = np.repeat(np.arange(self.terms), needed)
        self.within = _grouped(program.predecessor, owner, program.predecessor_lag_s, self.terms)
        self.across = _grouped(program.carry_source, program.carry_target, program.carry_lag_s, self.terms)
        self.carries = {i for i, targets in enumerate(self.across) if targets}
        self.last_step = (steps - 1) * self.terms
        self.latencies: list[float] = program.latency_s.tolist()
        self.env = simpy.Environment()
        shared = shared_terms(program).tolist()
        self.pool = FluidPool(self.env, program, self._done)
        self.engines = Engines(self.env, program, share, self._done)
        self.special = [shared[i] or self.engines.concerns(i) for i in range(self.terms)]

    def go(self) -> None:
        """Runs everything.

        Raises:
            InternalError: Some terms never ran.
        """
        self._pass_on([number for number in range(self.terms) if self.waiting[number] == 0])
        self.env.run()
        if np.isnan(self.ended).any():
            raise InternalError("the simulation stopped before every term had run: the program deadlocks")

    def _done(self, number: int) -> None:
        """Ends a term that others could slow."""
        term = number % self.terms
        self.ended[number] = self.env.now
        if not self.engines.computes(term):
            self.engines.meet(term, -1)
        self._pass_on(self._released(number, self.env.now))

    def _released(self, number: int, end_s: float) -> list[int]:
        """Tells those who wait for a term when it ended; returns those that now wait for nobody."""
        term = number % self.terms
        base, free = number - term, []
        waiting, earliest = self.waiting, self.earliest
        later = base + self.terms if term in self.carries and base < self.last_step else -1
        for offset, targets in ((base, self.within[term]), (later, self.across[term] if later >= 0 else ())):
            for target, lag in targets:
                at = offset + target
                ready = end_s + lag
                earliest[at] = max(earliest[at], ready)
                waiting[at] -= 1
                if waiting[at] == 0:
                    free.append(at)
        return free

    def _pass_on(self, free: list[int]) -> None:
        """Begins terms that wait for nobody, and in turn those that wait for nobody else."""
        while free:
            number = free.pop()
            start = self.started[number] = self.earliest[number]
            if self.special[number % self.terms]:
                self.env.timeout(max(start - self.env.now, 0.0), number).callbacks.append(self._begin)
            else:
                end = self.ended[number] = start + self.durations[number]
                free += self._released(number, end)

    def _begin(self, event: simpy.Event) -> None:
        number = cast(int, event.value)
        term = number % self.terms
        if self.engines.computes(term):
            self.engines.start(number, term, self.durations[number])
            return
        self.engines.meet(term, 1)
        if self.pool.shares(term):
            self.env.timeout(self.latencies[term], number).callbacks.append(self._flow)
        else:
            self.env.timeout(self.durations[number], number).callbacks.append(self._timed)

    def _flow(self, event: simpy.Event) -> None:
        self.pool.start(cast(int, event.value))

    def _timed(self, event: simpy.Event) -> None:
        self._done(cast(int, event.value))


def _grouped(source: IntArray, target: IntArray, lag_s: FloatArray, count: int) -> list[list[tuple[int, float]]]:
    """Targets and lags by source."""
    order = np.argsort(source, kind="stable")
    pairs = list(zip(target[order].tolist(), lag_s[order].tolist(), strict=True))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=count))]).tolist()
    return [pairs[a:b] for a, b in pairwise(bounds)]


def run_program(program: Program, factors: FloatArray, share: float = 0.0) -> tuple[FloatArray, FloatArray]:
    """Executes a program for as many steps as `factors` has rows.

    Args:
        program: What is executed.
        factors: Multiplies the duration of each term, shape (steps, terms).
        share: Of a device that collectives take from the computation beside them.

    Returns:
        Start and end of each term in each step.

    Raises:
        InternalError: The program deadlocks.
    """
    run = _Run(program, factors, share)
    run.go()
    return np.array(run.started).reshape(factors.shape), np.array(run.ended).reshape(factors.shape)


def simulate_setting(
    setting: Setting, *, jitter: float = 0.0, stragglers: Mapping[int, float] | None = None, seed: int = 0, steps: int | None = None
) -> Result:
    """Predicts a step by simulation; see `simtrain.simulate`."""
    slow = dict(stragglers or {})
    _check_disturbances(setting, jitter, slow)
    disturbed = jitter > 0 or bool(slow)
    lowered = lower(setting, split=disturbed)
    program, classes = lowered.program, lowered.layout.classes
    measured = steps if steps is not None else (DISTURBED_STEPS if jitter > 0 else STEADY_STEPS)
    if measured < 1:
        raise InputError(f"steps must be at least 1, not {measured}")
    factors = _factors(program, measured + WARM_UP_STEPS, jitter, slow, seed)
    start_s, end_s = run_program(program, factors, setting.runtime.communication_share)
    last, period = len(factors) - 1, 0.0
    slowest = slowest_class(program, start_s[WARM_UP_STEPS:].sum(axis=0), end_s[WARM_UP_STEPS:].sum(axis=0))
    parts = dict.fromkeys(PARTS, 0.0)
    final = int(lowered.pass_terms[slowest][-1])
    periods = np.diff(end_s[WARM_UP_STEPS - 1 :, final])
    for step, duration in enumerate(periods, start=WARM_UP_STEPS):
        for name, value in breakdown(program, start_s[step], end_s[step], float(duration), slowest).items():
            parts[name] += value / measured
    period = float(periods.mean())
    offset = first_compute_s(program, start_s[last])
    return assemble(
        lowered.layout,
        "simulate",
        period,
        parts,
        {k: v / measured for k, v in _busy(program, start_s, end_s, slowest).items()},
        timed_memory(lowered, start_s[last] - offset, end_s[last] - offset),
        events=trace_events(program, start_s[last] - offset, end_s[last] - offset, period),
        notes=_notes(jitter, slow, measured, periods),
        busy_by_rank=by_rank(classes, [_busy(program, start_s, end_s, i)["compute"] / measured for i in range(len(classes))]),
    )


def _busy(program: Program, start_s: FloatArray, end_s: FloatArray, rank_class: int) -> dict[str, float]:
    return busy_s(program, start_s[WARM_UP_STEPS:].sum(axis=0), end_s[WARM_UP_STEPS:].sum(axis=0), rank_class)


def _notes(jitter: float, slow: Mapping[int, float], measured: int, periods: FloatArray) -> list[str]:
    notes = []
    if jitter:
        notes.append(f"jitter: compute time of every rank and step varies with a relative deviation of {jitter:g}, over {measured} steps")
        notes.append(f"step times between {periods.min():.6g} s and {periods.max():.6g} s")
    if slow:
        notes.append("stragglers: " + ", ".join(f"rank {r} slowed {f:g} times" for r, f in sorted(slow.items())))
    return notes


def _check_disturbances(setting: Setting, jitter: float, slow: Mapping[int, float]) -> None:
    if not 0 <= jitter < 1:
        raise InputError(f"jitter is a relative standard deviation between 0 and 1, not {jitter!r}")
    if jitter and setting.strategy.low_communication:
        raise UnsupportedError(
            f"jitter beside low_communication={setting.strategy.low_communication} is not modelled: the exchange is spread over all steps, "
            "so that replicas would wait for each other in every one; use jitter=0"
        )
    ranks = len(setting.devices)
    for rank, factor in slow.items():
        if not isinstance(rank, int) or not 0 <= rank < ranks:
            raise InputError(f"straggler rank {rank!r} does not exist: ranks are 0 to {ranks - 1}")
        if not (np.isfinite(factor) and factor > 0):
            raise InputError(f"straggler factor of rank {rank} must be above zero, not {factor!r}")
    if (jitter or slow) and ranks > MAX_SPLIT_RANKS:
        raise UnsupportedError(f"disturbances of single ranks are simulated for up to {MAX_SPLIT_RANKS} ranks, not {ranks}")


def _factors(program: Program, steps: int, jitter: float, slow: Mapping[int, float], seed: int) -> FloatArray:
    """Duration factors: one per rank and step, log-normal with mean 1, on everything its device computes."""
    factors = np.ones((steps, len(program)))
    if not (jitter or slow):
        return factors
    rng = np.random.default_rng(seed)
    sigma = np.sqrt(np.log1p(jitter**2))
    for i, rank_class in enumerate(program.rank_classes):
        drawn = rng.lognormal(-(sigma**2) / 2, sigma, size=steps) if jitter else np.ones(steps)
        streams = [j for j, s in enumerate(program.streams) if s.rank_classes == (i,) and s.name == "compute"]
        own = np.isin(program.stream, streams) & (program.kind != TermKind.COLLECTIVE)
        factors[:, own] = (drawn * max(slow.get(rank, 1.0) for rank in rank_class.ranks))[:, None]
    return factors
