"""One search, from cheap to dear: everything screened, what may be best estimated, the best of that scheduled and at last simulated."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from simtrain.core.hardware import Cluster
from simtrain.core.result import Result
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.planner.arrays.finalists import Pool, screen_blocks
from simtrain.planner.failures import difference, failure, refusal, too_large
from simtrain.planner.found import Failure, Plan
from simtrain.planner.objectives import BALANCED, TIMED, Judge, Limits
from simtrain.planner.screen import REFUSALS, Screen
from simtrain.planner.space import Block, Candidate
from simtrain.step.predict import estimate, schedule, simulate

EXHAUSTIVE = 100
SHORT_STEPS = 40_000
"""Spaces of at most so many combinations, and instructions of all of them, are read in full."""

KEPT = 12
"""Strategies that larger spaces are searched for."""

SCHEDULED = 5
"""Of the best, how many are read by `schedule` where reading takes long."""

MARGIN = 0.01
"""Share of the step time by which a screen may be wrong: what is as close to the best is scheduled too."""

SIMULATED = 3
LONG_STEP = 4_000
"""Instructions of a step beyond which it is scheduled for few and simulated for none."""

PATIENCE_S = 40.0
"""Screening stops after so long, on the wall clock, and the plan says that it is not complete."""

BUSY = 0.8
"""Share of a processor below which a search that was cut short says that others used the machine."""


@dataclass(slots=True)
class Search:
    """One search; `run` fills the lists.

    Attributes:
        workload: What is trained.
        cluster: On what.
        space: What is searched.
        judge: By what it is ranked.
        limits: What it is kept to.
        progress: Called with (done, total).
        patience_s: When to stop.
        start_s: When it began.
        start_cpu_s: What the process had computed by then.
        skipped: How many were not looked at as time was up, by runtime.
        found: What fits and was read.
        failed: What does not, and why.
        projected: What fits, with seconds per sample as the screen has them.
        too_slow: What a bound shows to be no match for the best of `projected`, with its seconds per sample.
        lost: What was screened as if it fitted, and does not or cannot be; until something takes its place.
        fitting: What was read and fits, with seconds per sample as screened.
        pool: What arrays say fits.
        passed_over: How many are no match for the best.
        unread: How many were not looked at.
        unlisted: How many do not fit beside those listed.
        screened: How many were estimated as arrays.
        done: How many were looked at.
    """

    workload: Workload
    cluster: Cluster
    space: tuple[Block, ...]
    judge: Judge
    limits: Limits
    progress: Callable[[int, int], None] | None
    patience_s: float
    start_s: float = field(default_factory=time.monotonic)
    start_cpu_s: float = field(default_factory=time.process_time)
    skipped: Counter[str] = field(default_factory=Counter)
    found: list[tuple[Candidate, Result]] = field(default_factory=list)
    failed: list[tuple[Candidate, Failure]] = field(default_factory=list)
    projected: list[tuple[float, Candidate]] = field(default_factory=list)
    too_slow: list[tuple[float, Candidate]] = field(default_factory=list)
    lost: list[Candidate] = field(default_factory=list)
    fitting: list[tuple[float, Candidate]] = field(default_factory=list)
    pool: Pool | None = None
    passed_over: int = 0
    unread: int = 0
    unlisted: int = 0
    screened: int = 0
    done: int = 0

    def run(self, global_batch: int) -> Plan:
        """Searches.

        Args:
            global_batch: That the plan names.
        """
        every = [block.candidate(i) for block in self.space for i in range(len(block))] if sum(map(len, self.space)) <= EXHAUSTIVE else []
        small = 0 < sum(_instructions(c.strategy) for c in every) <= SHORT_STEPS
        screen = Screen(self.workload, self.cluster, self.limits.memory_margin)
        ordered = [(0.0, c) for c in every] if small else self._ordered(screen, self._screened())
        for number, (bound_s, candidate) in enumerate(ordered):
            if not small and self._late():
                self.skipped.update(c.runtime.name for _, c in ordered[number:])
                break
            self._look(screen, candidate, bound_s, small)
            self._tick()
        self.unread = sum(map(len, self.space)) - self.done
        self._read_projected(screen)
        self._refine()
        results = self.judge.ranked([r for _, r in self.found])
        failed = sorted((self._with_change(c, f) for c, f in self.failed), key=lambda f: (f.over_bytes == 0, f.over_bytes))
        return Plan(
            workload=self.workload.name,
            cluster=self.cluster.name,
            global_batch=global_batch,
            objective=self.judge.objectives[0],
            considered=sum(map(len, self.space)),
            ranked=tuple(results),
            failed=tuple(failed),
            passed_over=self.passed_over,
            unread=self.unread,
            front=tuple(self.judge.front(results)),
            unlisted=self.unlisted,
            objectives=self.judge.objectives,
            notes=self._notes(small),
            elapsed_s=time.monotonic() - self.start_s,
        )

    def _tick(self, count: int = 1) -> None:
        self.done += count
        if self.progress is not None and count:
            self.progress(self.done, sum(map(len, self.space)))

    def _late(self) -> bool:
        return time.monotonic() - self.start_s > self.patience_s

    def _screened(self) -> list[Candidate]:
        """Screens by arrays what they know; returns the rest."""
        found = screen_blocks(self.workload, self.cluster, self.space, self.judge.objectives, self.limits, self._tick, self._late)
        self.projected += found.finalists
        self.failed += found.failed
        self.passed_over, self.unlisted = self.passed_over + found.passed_over, self.unlisted + found.unlisted
        self.screened, self.pool = found.known, found.pool
        for block in found.skipped:
            self.skipped[block.runtime.name] += len(block)
        return list(found.rest)

    def _ordered(self, screen: Screen, choices: Sequence[Candidate]) -> list[tuple[float, Candidate]]:
        """The candidates with the bounds of their time per sample, most promising first; what cannot be is counted as failed."""
        ordered = sorted(self._bounded(screen, choices), key=lambda pair: pair[0])
        self._tick(len(choices) - len(ordered))
        return ordered

    def _bounded(self, screen: Screen, choices: Sequence[Candidate]) -> list[tuple[float, Candidate]]:
        bounded = []
        for candidate in choices:
            try:
                bounded.append((screen.bound_s(candidate) / candidate.strategy.global_batch, candidate))
            except REFUSALS as error:
                self.lost.append(candidate)
                self.failed.append((candidate, refusal(candidate, str(error))))
        return bounded

    def _look(self, screen: Screen, candidate: Candidate, bound_s: float, small: bool) -> None:
        try:
            if small:
                self._add(candidate, schedule(self.workload, self.cluster, candidate.strategy, runtime=candidate.runtime))
                return
            if bound_s > self._bar_s(candidate):
                self.too_slow.append((bound_s, candidate))
                return
            larger = screen.too_large(candidate)
            if larger is not None:
                self.lost.append(candidate)
                self.failed.append((candidate, too_large(candidate, *larger, self.limits)))
            else:
                self.projected.append((screen.projected_s(candidate) / candidate.strategy.global_batch, candidate))
        except REFUSALS as error:
            self.lost.append(candidate)
            self.failed.append((candidate, refusal(candidate, str(error))))

    def _bar_s(self, candidate: Candidate) -> float:
        """Seconds per sample above which one is neither among the best nor its runtime's best; only of objectives that go with time."""
        timed = all(o in TIMED for o in self.judge.objectives)
        if not timed or len(self.projected) < KEPT or self.limits.power_w or self.limits.budget_usd:
            return float("inf")
        own = min((s for s, c in self.projected if c.runtime == candidate.runtime), default=float("inf"))
        return max(sorted(s for s, _ in self.projected)[KEPT - 1], own)

    def _add(self, candidate: Candidate, result: Result) -> None:
        broken = self.limits.broken_by(result)
        if not broken:
            self.found.append((candidate, result))
            return
        over = max(result.memory.device_bytes - result.memory.capacity_bytes * (1 - self.limits.memory_margin), 0.0)
        failed = failure(candidate, broken, over, result.memory if over else None)
        taken = max((times for _, times in self.limits.asked_of(result)), default=0.0)
        self.failed.append((candidate, failed if over else replace(failed, times_limit=taken)))

    def _read_projected(self, screen: Screen) -> None:
        """Reads the best of what was projected, of every runtime at least one; with objectives other than time, all of it.

        What does not fit when it is read makes room for the next best, until enough fit or nothing is left.
        """
        read: set[Candidate] = set()
        while True:
            self.projected.sort(key=lambda pair: pair[0])
            for pair in tuple(self.projected):
                if pair[1] not in read and not self._enough(*pair) and not (self._over_time() and len(self.found) >= SCHEDULED):
                    read.add(pair[1])
                    self._read(*pair)
            if not self.lost:
                break
            self._replace(screen)
        self.passed_over += len(self.too_slow)
        for _, candidate in self.projected:
            self._leave(candidate.runtime.name, candidate not in read)

    def _read(self, seconds: float, candidate: Candidate) -> None:
        before = len(self.found)
        self._add(candidate, estimate(self.workload, self.cluster, candidate.strategy, runtime=candidate.runtime))
        if len(self.found) > before:
            self.fitting.append((seconds, candidate))
        elif self.failed[-1][1].over_bytes:
            self.projected.remove((seconds, candidate))
            self.lost.append(candidate)

    def _leave(self, runtime: str, count: int) -> None:
        """Counts what was not read though it may fit: no match for the best where time decides, else not looked at."""
        timed = all(o in TIMED for o in self.judge.objectives)
        self.passed_over += count * timed
        self.unread += count * (not timed)
        self.skipped[runtime] += count * (not timed)

    def _enough(self, seconds: float, candidate: Candidate) -> bool:
        """Whether time decides and enough fits that is faster, of this runtime too."""
        if not all(o in TIMED for o in self.judge.objectives) or len(self.fitting) < KEPT:
            return False
        own = min((s for s, c in self.fitting if c.runtime == candidate.runtime), default=float("inf"))
        return seconds >= max(sorted(s for s, _ in self.fitting)[KEPT - 1], own)

    def _over_time(self) -> bool:
        return time.monotonic() - self.start_s > self.patience_s + 10

    def _replace(self, screen: Screen) -> None:
        """Projects what takes the place of what does not fit."""
        lost, self.lost = self.lost, []
        if self._over_time():
            self._give_up()
            return
        finalists, close = self.pool.take(lost) if self.pool else ([], [])
        self.passed_over -= len(finalists) + len(close)
        self.projected += finalists
        slow, self.too_slow = self.too_slow, []
        for bound_s, candidate in sorted([*slow, *self._bounded(screen, close)], key=lambda pair: pair[0]):
            self._look(screen, candidate, bound_s, small=False)

    def _give_up(self) -> None:
        """Counts what might have taken the place of what does not fit as not looked at; if time decides, where nothing else was found."""
        timed, fitting = all(o in TIMED for o in self.judge.objectives), {c.runtime.name for _, c in self.fitting}
        for name in {block.runtime.name for block in self.space} - (fitting if timed else set()):
            slow = [pair for pair in self.too_slow if pair[1].runtime.name == name]
            self.too_slow = [pair for pair in self.too_slow if pair[1].runtime.name != name]
            left = self.pool.left(name) if self.pool else 0
            self.passed_over -= left
            self.unread += left + len(slow)
            self.skipped[name] += left + len(slow)

    def _refine(self) -> None:
        """Reads the best anew by `schedule`, of every runtime at least one, and the very best by `simulate`."""
        for reader, count in ((schedule, SCHEDULED), (simulate, SIMULATED)):
            read: set[Candidate] = set()
            while True:
                most = count if reader is simulate else max(count, self._close())
                ranked = [self._pair(r) for r in self.judge.ranked([r for _, r in self.found])]
                ahead = ranked[:most] if reader is simulate else [*ranked[:most], *_first_of_each(ranked[most:])]
                waiting = [(c, r) for c, r in ahead if c not in read]
                if not waiting:
                    break
                for candidate, result in waiting:
                    read.add(candidate)
                    if result.reader == reader.__name__ or (reader is simulate and _instructions(candidate.strategy) > LONG_STEP):
                        continue
                    self.found.remove((candidate, result))
                    self._add(candidate, reader(self.workload, self.cluster, candidate.strategy, runtime=candidate.runtime))

    def _close(self) -> int:
        """How many are as good as the best within what their reading may be wrong by."""
        best = min((r.step_time_s / r.global_batch for _, r in self.found), default=0.0)
        return sum(r.step_time_s / r.global_batch <= best * (1 + MARGIN) for _, r in self.found)

    def _pair(self, result: Result) -> tuple[Candidate, Result]:
        return next(pair for pair in self.found if pair[1] is result)

    def _notes(self, small: bool) -> tuple[str, ...]:
        notes = []
        if small:
            notes.append("every combination was read by schedule, the best by simulate")
        else:
            arrays = f"{self.screened:,} of {sum(map(len, self.space)):,} were estimated as arrays"
            how = arrays if self.screened else "bounds and memory screened all"
            notes.append(f"{how}, estimate read the best, schedule the best {SCHEDULED} of them")
        if any(_instructions(c.strategy) > LONG_STEP for c, r in self.found if r.reader == "schedule"):
            notes.append(f"steps of more than {LONG_STEP} instructions were not simulated")
        read = {c for c, _ in (*self.found, *self.failed)}
        best = min((r.step_time_s / r.global_batch for _, r in self.found), default=0.0)
        if close := sum(seconds <= best * (1 + MARGIN) and c not in read for seconds, c in self.projected):
            notes.append(f"{close} more are within {MARGIN:.0%} of the best as the screen has it, and were not scheduled")
        if self.unread:
            notes.append(self._cut_short())
        if BALANCED in self.judge.objectives and not self.judge.weights.noise_batch:
            notes.append("balanced: the gradient noise scale is assumed to be the largest batch considered")
        return tuple(notes)

    def _cut_short(self) -> str:
        """What a search that ran out of time left, and why so much."""
        sizes = Counter[str]()
        for block in self.space:
            sizes[block.runtime.name] += len(block)
        left = ", ".join(f"{name} {count:,} of {sizes[name]:,}" for name, count in self.skipped.items() if count)
        took_s, share = time.monotonic() - self.start_s, (time.process_time() - self.start_cpu_s) / (time.monotonic() - self.start_s)
        busy = f"; the machine was busy and gave it {share:.0%} of a processor" if share < BUSY else ""
        return (
            f"NOT COMPLETE: {self.unread:,} of {sum(sizes.values()):,} combinations were not looked at ({left}) as {self.patience_s:g} s "
            f"were over, {took_s:.0f} s in all with the readings of the best{busy}; patience_s (--patience) gives it longer"
        )

    def _with_change(self, candidate: Candidate, failure: Failure) -> Failure:
        near = min(self.found, key=lambda pair: (difference(candidate, pair[0]), -pair[1].samples_per_s), default=None)
        if near is None or not failure.over_bytes:
            return failure
        return replace(failure, smallest_change=str(near[0].strategy), smallest_change_samples_per_s=near[1].samples_per_s)


def _first_of_each(pairs: Sequence[tuple[Candidate, Result]]) -> list[tuple[Candidate, Result]]:
    """The first of every runtime."""
    return list({c.runtime: (c, r) for c, r in reversed(pairs)}.values())


def _instructions(strategy: Strategy) -> int:
    return 2 * strategy.accumulation * strategy.pipeline * max(strategy.chunks, 1)


__all__ = ["PATIENCE_S", "Search"]
