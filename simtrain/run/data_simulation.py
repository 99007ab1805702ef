"""The loader of `data` as a discrete-event simulation: workers, queues, prefetch, shared cores and shared storage."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simpy

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from simtrain.core.units import format_time
from simtrain.run.data import WORTH_SAYING, Feeding, Loader, Storage, demand, feed

SLICES = 8
"""Into how many turns of reading and decoding a batch is cut, at most."""


class SharedServer:
    """A resource that all who use it share equally, each up to what it can take.

    Args:
        env: The simulation.
        capacity: Units of work per second, in all.
    """

    def __init__(self, env: simpy.Environment, capacity: float) -> None:
        self._env, self._capacity = env, capacity
        self._left: dict[simpy.Event, list[float]] = {}
        self._since = 0.0
        self._version = 0

    def work(self, amount: float, limit: float = 1.0) -> simpy.Event:
        """Returns what happens once `amount` is done, at no more than `limit` units per second."""
        done = self._env.event()
        if amount <= 0:
            done.succeed()
            return done
        self._progress()
        self._left[done] = [amount, limit]
        self._schedule()
        return done

    def _rates(self) -> dict[simpy.Event, float]:
        """Fills equally, what one cannot take going to the others."""
        left, rates = self._capacity, {}
        waiting = sorted(self._left.items(), key=lambda item: item[1][1])
        for number, (done, (_, limit)) in enumerate(waiting):
            rates[done] = min(limit, left / (len(waiting) - number))
            left -= rates[done]
        return rates

    def _progress(self) -> None:
        passed, self._since = self._env.now - self._since, self._env.now
        if passed:
            for done, rate in self._rates().items():
                self._left[done][0] -= rate * passed

    def _schedule(self) -> None:
        self._version += 1
        if self._left:
            rates, version = self._rates(), self._version
            wait = max(min(self._left[done][0] / rate for done, rate in rates.items()), 0.0)
            self._env.timeout(wait).callbacks.append(lambda _: self._finish(version))

    def _finish(self, version: int) -> None:
        if version != self._version:
            return
        self._progress()
        rates = self._rates()
        first = min(self._left[done][0] / rates[done] for done in self._left)
        for done in [d for d in self._left if self._left[d][0] / rates[d] <= first + 1e-12 * max(1.0, self._env.now)]:
            del self._left[done]
            done.succeed()
        self._schedule()


@dataclass
class _Run:
    loader: Loader
    storage: Storage
    step_s: float
    main_cpu_s: float
    batches: int
    factors: FloatArray

    def __post_init__(self) -> None:
        loader = self.loader
        self.env = simpy.Environment()
        self.needs = demand(loader, self.storage)
        self.cores = SharedServer(self.env, loader.cores / loader.ranks)
        self.disk = simpy.Resource(self.env)
        self.link = simpy.Resource(self.env)
        self.slices = min(loader.batch, SLICES) if self.needs.storage_s > 0 else 1
        self.ready = [self.env.event() for _ in range(len(self.factors))]
        self.indices = [simpy.Store(self.env) for _ in range(loader.workers)]
        self.arrived = simpy.Store(self.env)
        self.begun_s: list[float] = []
        self.asked = 0

    def go(self) -> FloatArray:
        for worker in range(self.loader.workers):
            self.env.process(self._worker(worker))
        self.env.process(self._pinning())
        for _ in range(self.loader.workers * self.loader.prefetch):
            self._ask()
        self.env.run(self.env.process(self._main()))
        return np.asarray(self.begun_s)

    def _ask(self) -> None:
        if self.loader.workers:
            self.indices[self.asked % self.loader.workers].put(self.asked)
            self.asked += 1

    def _prepare(self, batch: int) -> Generator[simpy.Event, Any, None]:
        """Reads and decodes in turns, as samples are: requests wait for the storage in the order in which they came."""
        part, needs = float(self.factors[batch]) / self.slices, self.needs
        for _ in range(self.slices):
            with self.disk.request() as turn:
                yield turn
                yield self.env.timeout(needs.storage_s * part)
            yield self.env.timeout((needs.read_s - needs.storage_s) * part)
            yield self.cores.work(needs.cpu_s * part)

    def _worker(self, worker: int) -> Generator[simpy.Event, Any, None]:
        while True:
            batch = yield self.indices[worker].get()
            yield from self._prepare(batch)
            self.arrived.put(batch)

    def _pinning(self) -> Generator[simpy.Event, Any, None]:
        while True:
            batch = yield self.arrived.get()
            yield self.env.timeout(self.needs.pin_s)
            self.ready[batch].succeed()

    def _copy(self) -> Generator[simpy.Event, Any, None]:
        with self.link.request() as turn:
            yield turn
            yield self.env.timeout(self.needs.copy_s)

    def _main(self) -> Generator[simpy.Event, Any, None]:
        """One rank's loop; a copy beside the step is of the next batch, so that the step waits for the one before."""
        copied: simpy.Event = self.env.timeout(0)
        for batch in range(self.batches):
            if self.loader.workers:
                yield self.ready[batch]
                self._ask()
            else:
                yield from self._prepare(batch)
                yield self.env.timeout(self.needs.pin_s)
            yield self.cores.work(self.loader.receive_s)
            if self.loader.overlapped_copy:
                yield copied
                copied = self.env.process(self._copy())
            else:
                yield from self._copy()
            self.begun_s.append(self.env.now)
            yield self.env.timeout(self.step_s - self.main_cpu_s)
            yield self.cores.work(self.main_cpu_s)


def simulate_loading(
    loader: Loader,
    step_s: float,
    storage: Storage | None = None,
    *,
    main_cpu_s: float | None = None,
    batches: int = 200,
    seed: int = 0,
) -> Feeding:
    """Predicts the period of a step with its input by simulation; the second half of the batches is measured.

    Args:
        loader: How batches are prepared; with a `variation`, preparation times are log-normal with that relative deviation.
        step_s: Duration of the step, input at hand.
        storage: Where samples come from; by default nothing is read.
        main_cpu_s: Core time of the main process within a step; by default all of it.
        batches: Simulated.
        seed: Of the variation.

    Returns:
        As `feed` does, with the simulated period; bounds are those of the closed form, and so are cures but for deeper prefetch. Where
        the period is longer because preparation times vary, it is bound by "variation".

    Raises:
        InputError: See `feed`; or too few batches to settle.
    """
    if batches < max(20, 4 * loader.workers):
        raise InputError(f"batches are {max(20, 4 * loader.workers)} or more, not {batches}: the first half settles")
    closed = feed(loader, step_s, storage, main_cpu_s=main_cpu_s)
    main_s = step_s if main_cpu_s is None else main_cpu_s

    def period(of: Loader) -> float:
        return _period_s(of, step_s, storage or Storage(), main_s, batches, seed)

    period_s = period(loader)
    if loader.variation == 0 or period_s < (1 + WORTH_SAYING) * closed.period_s:
        return replace(closed, period_s=period_s, notes=())
    deeper = replace(loader, prefetch=4 * loader.prefetch)
    after_s, cures = period(deeper), closed.cures
    if loader.workers and after_s < (1 - WORTH_SAYING) * period_s:
        cures = (f"prefetch of {deeper.prefetch} instead of {loader.prefetch}: {format_time(after_s)} a step", *cures)
    return replace(closed, period_s=period_s, bound_by="variation", cures=cures, notes=())


def _period_s(loader: Loader, step_s: float, storage: Storage, main_cpu_s: float, batches: int, seed: int) -> float:
    workers = loader.workers
    begun_first, drawn = max(batches // 2, workers), batches + workers * loader.prefetch  # workers are busy until the last that counts
    factors = np.ones(drawn)
    if loader.variation:
        sigma = math.sqrt(math.log1p(loader.variation**2))
        factors = np.random.default_rng(seed).lognormal(-(sigma**2) / 2, sigma, size=drawn)
    begun = _Run(loader, storage, step_s, main_cpu_s, batches, factors).go()
    counted = (batches - 1 - begun_first) // max(workers, 1) * max(workers, 1)  # whole rounds of the workers, which may come in bursts
    return float((begun[begun_first + counted] - begun[begun_first]) / counted)
