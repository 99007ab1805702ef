"""Why a strategy takes what it takes: what bounds it, what more of a resource or one other choice is worth, what would make it feasible.

Every change is priced anew by `schedule` rather than read off the counts of the critical path. These counts are derivatives in what terms
take; but 10 % more bandwidth also moves operators from memory-bound to compute-bound, changes which algorithm the library chooses, what
overlaps, and which path is critical, and each of these is a kink that a derivative does not see. A repriced step costs a fraction of a
second and has them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simtrain.core import catalog
from simtrain.core.errors import InputError, UnsupportedError
from simtrain.core.hardware import Cluster
from simtrain.core.result import Result
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.units import format_bytes, format_time
from simtrain.core.workload import Workload
from simtrain.planner.objectives import Limits
from simtrain.planner.resources import scaled
from simtrain.planner.screen import ALWAYS_HOLDING, REFUSALS, Screen, projected_s
from simtrain.planner.space import HABITS, Candidate, Wishes, candidates, default_runtimes
from simtrain.step.offload_hint import offload_hint
from simtrain.step.predict import schedule
from simtrain.step.setting import resolve

if TYPE_CHECKING:
    from simtrain.planner.found import Failure

MORE = 1.1
"""How much more of a resource is priced."""

ROUND_OFF = 1e-12
"""Relative differences below this come from adding and subtracting."""

MOST_COPIES = 64
"""Times as many machines as are tried when a model fits nowhere."""


@dataclass(frozen=True, slots=True)
class Worth:
    """What one change is worth.

    Attributes:
        change: In words: "10 % more memory bandwidth", or a choice such as "micro_batch=2, accumulation=8".
        step_time_s: With it.
        gain: Throughput it adds, relative (0.05 is 5 % more samples per second).
        fits: Whether it fits the device's memory.
    """

    change: str
    step_time_s: float
    gain: float
    fits: bool = True


@dataclass(frozen=True, slots=True)
class Why:
    """Reasons of one strategy.

    Attributes:
        strategy: As text.
        bound_by: What the step spends its time on, in words.
        resources: What 10 % more of each resource and a few more devices are worth, most first.
        knobs: What one other choice is worth, best first.
    """

    strategy: str
    bound_by: str
    resources: tuple[Worth, ...]
    knobs: tuple[Worth, ...]


def why(
    workload: Workload | str,
    cluster: Cluster | str,
    strategy: Strategy | str,
    *,
    runtime: Runtime | str | None = None,
    margin: float = 0.0,
) -> Why:
    """Prices a strategy anew with 10 % more of each resource, with a few more devices, and with one choice changed, by `schedule`.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster or its text.
        strategy: What is asked about.
        runtime: What carries it out.
        margin: Share of memory that must stay free where a change is said to fit.

    Raises:
        InputError: See `simtrain.schedule`.
        UnsupportedError: See `simtrain.schedule`.
    """
    work = catalog.workload(workload) if isinstance(workload, str) else workload
    setting = resolve(work, cluster, strategy, runtime)
    machines, how, framework = setting.cluster, setting.strategy, setting.runtime
    candidate = Candidate(how, framework)
    now_s = projected_s(schedule, work, machines, candidate)
    resources = [
        _worth(f"10 % more {name}", now_s, projected_s(schedule, work, better, Candidate(how, launcher)))
        for name, better, launcher in scaled(machines, framework, MORE)
    ]
    resources += _more_devices(work, machines, candidate, now_s)
    knobs = []
    screen = Screen(work, machines, margin)
    for text, changed in neighbours(how, machines, framework):
        try:
            fits = screen.fits(screen.confirmed(Candidate(changed, framework)))
            knobs.append(replace(_worth(text, now_s, projected_s(schedule, work, machines, Candidate(changed, framework))), fits=fits))
        except REFUSALS:
            continue
    resources.sort(key=lambda w: -w.gain)
    knobs.sort(key=lambda w: (not w.fits, -w.gain))
    return Why(str(how), bound_in_words(_breakdown_s(work, machines, candidate)), tuple(resources), tuple(knobs))


def bound_in_words(breakdown_s: Mapping[str, float]) -> str:
    """Says what the step spends its time on, parts above 1 % in descending order."""
    parts, step_time_s = sorted(breakdown_s.items(), key=lambda item: -item[1]), sum(breakdown_s.values())
    shown = [f"{name} {time_s / step_time_s:.0%}" for name, time_s in parts if time_s > 0.01 * step_time_s]
    return f"bound by {parts[0][0]}: " + ", ".join(shown)


def _breakdown_s(workload: Workload, cluster: Cluster, candidate: Candidate) -> dict[str, float]:
    """Parts of the step, of long steps from two shorter ones as `projected_s` does for their sum."""
    strategy, framework = candidate.strategy, candidate.runtime
    few, more = 2 * strategy.pipeline, 3 * strategy.pipeline
    if strategy.accumulation <= 4 * strategy.pipeline or strategy.schedule in ALWAYS_HOLDING:
        return dict(schedule(workload, cluster, strategy, runtime=framework).breakdown_s)
    shorter, longer = (schedule(workload, cluster, strategy.with_(accumulation=n), runtime=framework).breakdown_s for n in (few, more))
    further = (strategy.accumulation - few) / (more - few)
    return {name: time_s + (longer[name] - time_s) * further for name, time_s in shorter.items()}


def _worth(change: str, before_s: float, after_s: float) -> Worth:
    return Worth(change, after_s, before_s / after_s - 1)


def _more_devices(workload: Workload, cluster: Cluster, candidate: Candidate, now_s: float) -> list[Worth]:
    """The fewest devices more that the global batch divides over, as more replicas; none where the network does not reach them."""
    how = candidate.strategy
    samples = how.global_batch // how.micro_batch
    data = next((d for d in range(how.data + 1, 2 * how.data + 1) if samples % d == 0), 0)
    if not data:
        return []
    more = how.with_(data=data, accumulation=samples // data)
    nodes = list(cluster.nodes)
    while sum(len(n.devices) for n in nodes) < more.ranks:
        nodes.append(nodes[-1])
    larger = replace(cluster, nodes=tuple(nodes)) if len(nodes) > len(cluster.nodes) else cluster
    added = more.ranks - how.ranks
    try:
        time_s = projected_s(schedule, workload, larger, Candidate(more, candidate.runtime))
    except (InputError, UnsupportedError):
        return []
    return [_worth(f"{added} more device{'s' if added > 1 else ''} (data={data})", now_s, time_s)]


def neighbours(strategy: Strategy, cluster: Cluster, runtime: Runtime) -> Iterator[tuple[str, Strategy]]:
    """Strategies with one choice changed, devices and global batch kept, with the change in words."""
    habits = HABITS.get(runtime.name, HABITS["megatron"])
    per_node = min(len(node.devices) for node in cluster.nodes)
    options: list[dict[str, Any]] = []
    for factor in (0.5, 2):
        options += [
            _traded(strategy, "micro_batch", "accumulation", factor),
            _traded(strategy, "pipeline", "data", factor) if habits.schedules else {},
            _traded(strategy, "tensor", "data", factor) if habits.tensor else {},
        ]
    options += [{"checkpoint": c} for c in habits.checkpoints if c != "selective" or not runtime.kernels.fused_attention]
    options += [{"zero": z} for z in habits.zeros if strategy.data * strategy.context > 1]
    options += [{"schedule": s, "chunks": c} for s, c in habits.schedules if strategy.pipeline > 1]
    if habits.sequence_parallel and strategy.tensor > 1:
        options.append({"sequence_parallel": not strategy.sequence_parallel})
    for changes in options:
        differing = {name: value for name, value in changes.items() if getattr(strategy, name) != value}
        if not differing or changes.get("tensor", 1) > per_node:
            continue
        changed = strategy.with_(**changes)
        if changed.global_batch == strategy.global_batch and changed.ranks == strategy.ranks:
            yield ", ".join(f"{n}={v}" for n, v in differing.items()), changed


def _traded(strategy: Strategy, name: str, other: str, factor: float) -> dict[str, Any]:
    """One degree times a factor at the cost of another; nothing where that leaves whole numbers. Fewer replicas accumulate more."""
    a, b = getattr(strategy, name) * factor, getattr(strategy, other) / factor
    changes = {name: a, other: b}
    if other == "data":
        changes["accumulation"] = strategy.accumulation * factor
        if name == "tensor":
            changes["sequence_parallel"] = strategy.sequence_parallel and a > 1
    if any(v != int(v) or v < 1 for n, v in changes.items() if n != "sequence_parallel"):
        return {}
    return {n: bool(v) if n == "sequence_parallel" else int(v) for n, v in changes.items()}


def near_limits(failed: Sequence[Failure]) -> tuple[str, ...]:
    """Says of limits other than memory how much of them the nearest takes."""
    lines = []
    for reason in dict.fromkeys(f.reason for f in failed if f.times_limit > 1):
        nearest = min((f for f in failed if f.reason == reason), key=lambda f: f.times_limit)
        lines.append(f"what fits the memory {reason}; the nearest takes {nearest.times_limit:.3g} times that, with {nearest.strategy}")
    return tuple(lines)


def feasible(workload: Workload, cluster: Cluster, global_batch: int, limits: Limits | None = None) -> tuple[str, ...]:
    """Says what would make a model fit that fits in none of the ways allowed: other choices, more memory, more machines.

    Args:
        workload: What is trained.
        cluster: On what.
        global_batch: Samples per step.
        limits: With the memory margin.
    """
    margin = (limits or Limits()).memory_margin
    lines = []
    here, over = _frugal(workload, cluster, global_batch, margin)
    if here is not None:
        lines.append(f"on these devices it fits with {here.strategy} under runtime {here.runtime.name}")
        return tuple(lines)
    if over is not None:
        least, excess = over
        lines.append(f"the most frugal way tried is over by {format_bytes(excess)}: it would fit devices with that much more memory")
        if not margin and (hint := offload_hint(workload, cluster, least.strategy, runtime=least.runtime)):
            lines.append(f"on these devices, {least.strategy} under {least.runtime.name} with {hint}")
    copies = 2
    while copies <= MOST_COPIES:
        try:
            more = replace(cluster, name=f"{copies}x {cluster.name}", nodes=cluster.nodes * copies)
            found, _ = _frugal(workload, more, global_batch, margin)
        except InputError:
            break  # the batch or the network does not divide over so many
        if found is not None:
            lines.append(f"it fits {copies} times as many machines ({more.size} devices) with {found.strategy} under {found.runtime.name}")
            break
        copies *= 2
    return tuple(lines)


def _frugal(
    workload: Workload, cluster: Cluster, global_batch: int, margin: float
) -> tuple[Candidate | None, tuple[Candidate, float] | None]:
    """The first strategy that fits among the most frugal of each way of dividing the model, and else the least excess and whose it is."""
    wishes = Wishes(None, None, None, "adamw", cluster.size, {"micro_batch": workload.at_least, "checkpoint": "full"})
    runtimes = default_runtimes(cluster, workload)
    screen = Screen(workload, cluster, margin)
    least: tuple[Candidate, float] | None = None
    listed = [c for c in candidates(workload, cluster, global_batch, runtimes, wishes)[0] if c.strategy.schedule == "1f1b"]
    for candidate in sorted(listed, key=lambda c: (c.strategy.tensor, c.strategy.pipeline, -c.strategy.zero)):
        try:
            memory = screen.confirmed(candidate)
        except REFUSALS:
            continue
        if screen.fits(memory):
            return candidate, None
        excess = memory.device_bytes - memory.capacity_bytes * (1 - margin)
        least = (candidate, excess) if least is None or excess < least[1] else least
    return None, least


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two results differ.

    Attributes:
        a: The first.
        b: The second.
        time_s: Seconds that `b` takes more, by part of the step.
        memory_bytes: Bytes that `b` takes more at its peak, by kind.
    """

    a: Result
    b: Result
    time_s: dict[str, float]
    memory_bytes: dict[str, float]

    def __str__(self) -> str:
        """The difference in a few lines."""
        ratio = self.a.step_time_s / self.a.global_batch / (self.b.step_time_s / self.b.global_batch)
        lines = [
            f"A: {self.a}",
            f"B: {self.b}",
            f"B has {ratio:.3g} times the throughput of A, "
            f"a step {format_time(abs(sum(self.time_s.values())))} {'longer' if self.b.step_time_s > self.a.step_time_s else 'shorter'}",
            "time, B - A: " + (_signed(self.time_s, format_time) or "equal"),
            "memory, B - A: " + (_signed(self.memory_bytes, format_bytes) or "equal"),
        ]
        return "\n".join(lines)

    def report(self, path: Path | str) -> None:
        """Writes one HTML file about it that needs no network: `simtrain.report.write_page`.

        Raises:
            InputError: The file cannot be written, or does not end in .html.
        """
        import_module("simtrain.report").write_page(self, path)  # by name: planner stands below what people read

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {"a": self.a.to_dict(), "b": self.b.to_dict(), "time_s": self.time_s, "memory_bytes": self.memory_bytes}


def compare(a: Result, b: Result) -> Comparison:
    """Splits the difference of two results: time by part, memory by kind, largest first; both sum to the differences of the totals."""
    return Comparison(a, b, _minus(b.breakdown_s, a.breakdown_s), _minus(dict(b.memory.by_kind_bytes), dict(a.memory.by_kind_bytes)))


def _minus(b: Any, a: Any) -> dict[str, float]:
    names = dict.fromkeys((*a, *b))
    parts = {name: float(b.get(name, 0.0) - a.get(name, 0.0)) for name in names}
    largest = max((abs(v) for m in (a, b) for v in m.values()), default=0.0)
    parts = {name: change if abs(change) > ROUND_OFF * largest else 0.0 for name, change in parts.items()}
    return dict(sorted(parts.items(), key=lambda item: -abs(item[1])))


def _signed(parts: dict[str, float], written: Any) -> str:
    largest = max((abs(v) for v in parts.values()), default=0.0)
    return ", ".join(f"{name} {'+' if v > 0 else '-'}{written(abs(v))}" for name, v in parts.items() if abs(v) > 0.005 * largest)


__all__ = ["Comparison", "Why", "Worth", "compare", "feasible", "neighbours", "why"]
