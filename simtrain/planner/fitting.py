"""The smallest change with which a strategy that does not fit fits."""

from __future__ import annotations

from simtrain.core.hardware import Cluster
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.planner.screen import REFUSALS, Screen, projected_s
from simtrain.planner.space import Candidate
from simtrain.planner.why import Worth, neighbours
from simtrain.step.predict import schedule

MOST_CHANGES = 5
"""Changes that are listed."""


def smallest_changes(
    workload: Workload, cluster: Cluster, strategy: Strategy, runtime: Runtime, *, margin: float = 0.0
) -> tuple[Worth, ...]:
    """Single choices that make a strategy fit, on as many devices and with the same batch, fastest first; else two choices at once.

    Args:
        workload: What is trained.
        cluster: On what.
        strategy: What does not fit.
        runtime: What carries it out.
        margin: Share of memory that must stay free.

    Returns:
        What fits, with the throughput that it gains over the strategy if that fitted; nothing where no two choices suffice.
    """
    screen = Screen(workload, cluster, margin)
    once = [changed for _, changed in neighbours(strategy, cluster, runtime)]
    found = _fitting(screen, once, runtime)
    if not found:
        twice = (both for changed in once for _, both in neighbours(changed, cluster, runtime))
        found = _fitting(screen, list(dict.fromkeys(both for both in twice if both != strategy)), runtime)
    now_s = projected_s(schedule, workload, cluster, Candidate(strategy, runtime))
    times = [(changed, projected_s(schedule, workload, cluster, Candidate(changed, runtime))) for changed in found]
    fastest = sorted(times, key=lambda pair: pair[1])[:MOST_CHANGES]
    return tuple(Worth(_difference(strategy, changed), time_s, now_s / time_s - 1) for changed, time_s in fastest)


def _fitting(screen: Screen, strategies: list[Strategy], runtime: Runtime) -> list[Strategy]:
    kept = []
    for strategy in strategies:
        try:
            if screen.fits(screen.confirmed(Candidate(strategy, runtime))):
                kept.append(strategy)
        except REFUSALS:
            continue
    return kept


def _difference(a: Strategy, b: Strategy) -> str:
    names = [name for name in Strategy.__dataclass_fields__ if getattr(a, name) != getattr(b, name)]
    return ", ".join(f"{name}={getattr(b, name)}" for name in names)


__all__ = ["smallest_changes"]
