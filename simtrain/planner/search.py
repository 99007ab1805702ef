"""`plan`: searches the strategies that make sense, ranks what fits, and says of the rest what would make it fit.

The search goes from cheap to dear: a lower bound of the step time for everything (`screen`), memory for what the bound leaves,
`estimate` for what fits, `schedule` and at last `simulate` for the best. A strategy is passed over only when its bound shows that it
cannot be among the best; how many were, and why the rest failed, is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.hardware import Cluster
from simtrain.core.result import Result
from simtrain.core.runtime import Runtime
from simtrain.core.runtime import runtime as find_runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.planner.arrays.finalists import screen_blocks
from simtrain.planner.evidence import nearest
from simtrain.planner.failures import difference, failure, refusal, too_large
from simtrain.planner.found import Failure, Plan
from simtrain.planner.objectives import BALANCED, OBJECTIVES, PRICED, TIMED, Judge, Limits, Objective, Weights, check_degrees, weights_of
from simtrain.planner.robust import FINALISTS, ModelError, check_robust, order, outlooks, settled
from simtrain.planner.screen import REFUSALS, Screen
from simtrain.planner.space import Block, Candidate, Wishes, blocks, check_fixed, default_runtimes, dividing, merged
from simtrain.planner.why import feasible, near_limits, why
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
"""Screening stops after so long and the plan says that it is not complete."""


def plan(
    workload: Workload | str,
    cluster: Cluster | str,
    global_batch: int | Sequence[int],
    *,
    objective: Objective | Sequence[Objective] = "throughput",
    precisions: Sequence[str] | None = None,
    checkpoints: Sequence[str] | None = None,
    zeros: Sequence[int] | None = None,
    optimizer: str = "adamw",
    runtime: Runtime | str | Sequence[Runtime | str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    devices: int | None = None,
    limits: Limits | None = None,
    weights: Weights | Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    patience_s: float = PATIENCE_S,
    explain: bool = False,
    robust: str = "",
    jitter: float = 0.0,
    model_error: ModelError | None = None,
) -> Plan:
    """Searches data, tensor, pipeline and context degrees, micro-batch, ZeRO, checkpointing and schedule for a global batch.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster or its text.
        global_batch: Samples per step, or several to choose from.
        objective: What to optimise; several give a Pareto front, ranked by the first.
        precisions: Recipes to try; by default what is customary with the runtime and every device has arithmetic for.
        checkpoints: Checkpointing to try.
        zeros: ZeRO stages to try (stages above 0 only with more than one replica).
        optimizer: Which one.
        runtime: What carries it out, or several to choose from; eager PyTorch on one machine (and Megatron-LM and FSDP2 where nothing
            fits under it), else Megatron-LM and FSDP2.
        fixed: Fields of the strategy with the value they must have, such as `{"tensor": 8}`.
        devices: How many of the cluster's devices to use; all by default.
        limits: What to keep to: memory with a margin or a probability of running out, power, budget, deadline.
        weights: Of the balanced score.
        progress: Called with (done, total).
        patience_s: When to stop; the plan then says how many combinations were not looked at.
        explain: Whether to price the best anew with more of each resource and with single choices changed, or where nothing fits to look
            for what would.
        robust: "expected" or "worst_decile" to choose among the finalists by that under errors of the model and jitter, not by the best
            guess; "" for the best guess. Only for objectives that go with the step time.
        jitter: Relative standard deviation of each rank's computation, for a robust choice.
        model_error: How far off predictions are, for a robust choice and for `memory_risk`.

    Raises:
        StrategyError: The global batch does not divide over the devices, or fixed fields contradict something.
        UnknownNameError: Of a workload, cluster, precision, runtime or objective.
        InputError: There is nothing to try, or limits contradict each other.
    """
    judge = Judge((objective,) if isinstance(objective, str) else tuple(objective), weights_of(weights))
    work = catalog.workload(workload) if isinstance(workload, str) else workload
    machines = catalog.cluster(cluster) if isinstance(cluster, str) else cluster
    errors = model_error or ModelError()
    kept_to = settled(limits or Limits(), errors)
    _check_prices(machines, judge, kept_to)
    check_robust(robust, judge.objectives[0], jitter)
    frameworks = _runtimes(runtime, machines)
    wishes = Wishes(
        precisions=None if precisions is None else tuple(precisions),
        checkpoints=None if checkpoints is None else tuple(checkpoints),
        zeros=None if zeros is None else tuple(zeros),
        optimizer=optimizer,
        devices=machines.size if devices is None else devices,
        fixed=check_fixed(fixed or {}),
    )
    batches = (global_batch,) if isinstance(global_batch, int) else tuple(global_batch)
    if not batches:
        raise InputError("give at least one global batch")
    check_degrees(wishes.fixed, wishes.devices, batches)
    search = _Search(work, machines, _listed(work, machines, batches, frameworks, wishes), judge, kept_to, progress, patience_s)
    found = search.run(batches[0])
    others = dividing(machines, frameworks) if runtime is None else ()
    if others:
        frameworks, found = _wider(search, frameworks, others, wishes, batches, found)
    if robust and found.best is not None:
        found = _robust(found, work, machines, frameworks, robust, errors, jitter)
    if not explain:
        return found
    if found.best is None:
        return replace(found, advice=near_limits(found.failed) or feasible(work, machines, batches[0], kept_to))
    framework = next(r for r in frameworks if r.name == found.best.runtime)
    reasons = why(work, machines, found.best.strategy, runtime=framework, margin=kept_to.memory_margin)
    return replace(found, why=reasons, evidence=nearest(work, machines, Strategy.parse(found.best.strategy)))


def _listed(
    workload: Workload, cluster: Cluster, batches: Sequence[int], frameworks: Sequence[Runtime], wishes: Wishes
) -> tuple[Block, ...]:
    return merged([b for batch in batches for b in blocks(workload, cluster, batch, frameworks, wishes)[0]])


def _wider(
    search: _Search, frameworks: tuple[Runtime, ...], others: tuple[Runtime, ...], wishes: Wishes, batches: Sequence[int], found: Plan
) -> tuple[tuple[Runtime, ...], Plan]:
    """The same search with the runtimes that divide models, where nothing fits under those that come first; else says what was left."""
    first, then = (" and ".join(r.name for r in f) for f in (frameworks, others))
    if found.best is not None:
        left = f"{then}, which divide models over devices, were not searched beside {first}: name runtimes (--runtime) to compare"
        return frameworks, replace(found, notes=(left, *found.notes))
    try:
        choices = _listed(search.workload, search.cluster, batches, others, wishes)
    except InputError:  # what is asked for is no choice under them
        return frameworks, found
    wider = _Search(search.workload, search.cluster, choices, search.judge, search.limits, search.progress, search.patience_s).run(
        batches[0]
    )
    both = replace(
        wider,
        considered=found.considered + wider.considered,
        failed=(*wider.failed, *found.failed),
        passed_over=found.passed_over + wider.passed_over,
        unlisted=found.unlisted + wider.unlisted,
        unread=found.unread + wider.unread,
        notes=(f"nothing fits under {first}, so {then} were searched as well", *wider.notes),
        elapsed_s=found.elapsed_s + wider.elapsed_s,
    )
    return (*frameworks, *others), both


def _robust(
    found: Plan, workload: Workload, cluster: Cluster, frameworks: Sequence[Runtime], by: str, errors: ModelError, jitter: float
) -> Plan:
    """The plan with its finalists in the order of what holds when the model errs."""
    finalists, rest = found.ranked[:FINALISTS], found.ranked[FINALISTS:]
    by_name = {r.name: r for r in frameworks}
    asked = [(Candidate(Strategy.parse(r.strategy), by_name[r.runtime]), r) for r in finalists]
    seen = outlooks(workload, cluster, asked, error=errors, jitter=jitter)
    places = order(seen, finalists, found.objective, by)
    return replace(
        found,
        ranked=(*(finalists[i] for i in places), *rest),
        outlooks=tuple(seen[i] for i in places),
        notes=(*found.notes, f"the first {len(finalists)} are in the order of the {by.replace('_', ' ')} under errors of the model"),
    )


def _check_prices(cluster: Cluster, judge: Judge, limits: Limits) -> None:
    unpriced = sorted({d.name for d in cluster.devices if d.price_usd_per_hour <= 0})
    if unpriced and (limits.budget_usd or any(o in PRICED for o in judge.objectives)):
        raise InputError(f"no price is known of {', '.join(unpriced)}: plan for throughput or energy, or give a device file with a price")


def _runtimes(given: Runtime | str | Sequence[Runtime | str] | None, cluster: Cluster) -> tuple[Runtime, ...]:
    if given is None:
        return default_runtimes(cluster)
    listed = (given,) if isinstance(given, str | Runtime) else tuple(given)
    return tuple(r if isinstance(r, Runtime) else find_runtime(r) for r in listed)


@dataclass(slots=True)
class _Search:
    """One search; `run` fills the lists."""

    workload: Workload
    cluster: Cluster
    space: tuple[Block, ...]
    judge: Judge
    limits: Limits
    progress: Callable[[int, int], None] | None
    patience_s: float
    start_s: float = field(default_factory=time.monotonic)
    found: list[tuple[Candidate, Result]] = field(default_factory=list)
    failed: list[tuple[Candidate, Failure]] = field(default_factory=list)
    projected: list[tuple[float, Candidate]] = field(default_factory=list)
    passed_over: int = 0
    unread: int = 0
    unlisted: int = 0
    screened: int = 0
    done: int = 0

    def run(self, global_batch: int) -> Plan:
        every = [block.candidate(i) for block in self.space for i in range(len(block))] if sum(map(len, self.space)) <= EXHAUSTIVE else []
        small = 0 < sum(_instructions(c.strategy) for c in every) <= SHORT_STEPS
        screen = Screen(self.workload, self.cluster, self.limits.memory_margin)
        for bound_s, candidate in [(0.0, c) for c in every] if small else self._ordered(screen, self._screened()):
            if not small and self._late():
                break
            self._look(screen, candidate, bound_s, small)
            self._tick()
        self.unread = sum(map(len, self.space)) - self.done
        self._read_projected()
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
        if self.progress is not None:
            self.progress(self.done, sum(map(len, self.space)))

    def _late(self) -> bool:
        return time.monotonic() - self.start_s > self.patience_s

    def _screened(self) -> list[Candidate]:
        """Screens by arrays what they know; returns the rest."""
        found = screen_blocks(self.workload, self.cluster, self.space, self.judge.objectives, self.limits, self._tick, self._late)
        self.projected += found.finalists
        self.failed += found.failed
        self.passed_over, self.unlisted = self.passed_over + found.passed_over, self.unlisted + found.unlisted
        self.screened = found.known
        return list(found.rest)

    def _ordered(self, screen: Screen, choices: Sequence[Candidate]) -> list[tuple[float, Candidate]]:
        """The candidates with the bounds of their time per sample, most promising first; what cannot be is counted as failed."""
        ordered = []
        for candidate in choices:
            try:
                ordered.append((screen.bound_s(candidate) / candidate.strategy.global_batch, candidate))
            except REFUSALS as error:
                self.failed.append((candidate, refusal(candidate, str(error))))
                self._tick()
        return sorted(ordered, key=lambda pair: pair[0])

    def _look(self, screen: Screen, candidate: Candidate, bound_s: float, small: bool) -> None:
        try:
            if small:
                self._add(candidate, schedule(self.workload, self.cluster, candidate.strategy, runtime=candidate.runtime))
                return
            if bound_s > self._bar_s():
                self.passed_over += 1
                return
            larger = screen.too_large(candidate)
            if larger is not None:
                self.failed.append((candidate, too_large(candidate, *larger, self.limits)))
            else:
                self.projected.append((screen.projected_s(candidate) / candidate.strategy.global_batch, candidate))
        except REFUSALS as error:
            self.failed.append((candidate, refusal(candidate, str(error))))

    def _bar_s(self) -> float:
        """Seconds per sample that the next candidate must be able to beat; only where the objective goes with time."""
        timed = all(o in TIMED for o in self.judge.objectives)
        if not timed or len(self.projected) < KEPT or self.limits.power_w or self.limits.budget_usd:
            return float("inf")
        return sorted(s for s, _ in self.projected)[KEPT - 1]

    def _add(self, candidate: Candidate, result: Result) -> None:
        broken = self.limits.broken_by(result)
        if not broken:
            self.found.append((candidate, result))
            return
        over = max(result.memory.device_bytes - result.memory.capacity_bytes * (1 - self.limits.memory_margin), 0.0)
        failed = failure(candidate, broken, over, result.memory if over else None)
        taken = max((times for _, times in self.limits.asked_of(result)), default=0.0)
        self.failed.append((candidate, failed if over else replace(failed, times_limit=taken)))

    def _read_projected(self) -> None:
        """Reads the best of what was projected; with objectives other than time, all of it."""
        self.projected.sort(key=lambda pair: pair[0])
        timed = all(o in TIMED for o in self.judge.objectives)
        for _, candidate in self.projected:
            late = time.monotonic() - self.start_s > self.patience_s + 10 and len(self.found) >= SCHEDULED
            if (timed and len(self.found) >= KEPT) or late:
                self.passed_over += timed
                self.unread += not timed
                continue
            self._add(candidate, estimate(self.workload, self.cluster, candidate.strategy, runtime=candidate.runtime))

    def _refine(self) -> None:
        """Reads the best anew by `schedule` and the very best by `simulate`."""
        for reader, count in ((schedule, SCHEDULED), (simulate, SIMULATED)):
            read: set[Candidate] = set()
            while True:
                most = count if reader is simulate else max(count, self._close())
                ahead = [self._pair(r) for r in self.judge.ranked([r for _, r in self.found])[:most]]
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
            notes.append(f"NOT COMPLETE: {self.unread} combinations were not looked at within {self.patience_s:.0f} s")
        if BALANCED in self.judge.objectives and not self.judge.weights.noise_batch:
            notes.append("balanced: the gradient noise scale is assumed to be the largest batch considered")
        return tuple(notes)

    def _with_change(self, candidate: Candidate, failure: Failure) -> Failure:
        near = min(self.found, key=lambda pair: (difference(candidate, pair[0]), -pair[1].samples_per_s), default=None)
        if near is None or not failure.over_bytes:
            return failure
        return replace(failure, smallest_change=str(near[0].strategy), smallest_change_samples_per_s=near[1].samples_per_s)


def _instructions(strategy: Strategy) -> int:
    return 2 * strategy.accumulation * strategy.pipeline * max(strategy.chunks, 1)


__all__ = ["OBJECTIVES", "Failure", "Plan", "plan"]
