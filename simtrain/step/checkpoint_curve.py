"""Time against memory: what every rule of recomputation costs, beside the best choice at every budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from simtrain.core.hardware import Cluster
from simtrain.core.result import Result
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.step.adaptive import settle_precision
from simtrain.step.remat_choice import Question, findings, settle
from simtrain.step.schedule import schedule_setting
from simtrain.step.setting import Setting, resolve

RULES = ("none", "every:2", "sqrt", "full")


@dataclass(frozen=True, slots=True)
class CheckpointPoint:
    """A way to recompute, with what it takes.

    Attributes:
        name: The rule, or "optimal".
        checkpoint: As a strategy says it.
        step_time_s: Of a step.
        device_bytes: Memory of the fullest device.
        fits: Whether it has so much.
    """

    name: str
    checkpoint: str
    step_time_s: float
    device_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True)
class CheckpointCurve:
    """Time against memory of one question.

    Attributes:
        workload: Name.
        cluster: Name.
        strategy: Without its checkpointing.
        capacity_bytes: What the fullest device has.
        rules: The fixed rules.
        optimal: The best choices, from the least memory to the most.
        findings: What would surprise, in words.
    """

    workload: str
    cluster: str
    strategy: str
    capacity_bytes: float
    rules: tuple[CheckpointPoint, ...]
    optimal: tuple[CheckpointPoint, ...]
    findings: tuple[str, ...]


def choose_checkpoint(
    workload: Workload | str, cluster: Cluster | str, strategy: Strategy | str, *, runtime: Runtime | str | None = None
) -> Strategy:
    """Puts explicit blocks in place of `checkpoint=optimal`; other strategies stay as they are.

    Args and errors are those of `simtrain.estimate`.

    Raises:
        StrategyError: Nothing fits the budget that the strategy gives.
    """
    return settle(settle_precision(resolve(workload, cluster, strategy, runtime))).strategy


def checkpoint_curve(
    workload: Workload | str,
    cluster: Cluster | str,
    strategy: Strategy | str,
    *,
    runtime: Runtime | str | None = None,
    budgets: int = 16,
) -> CheckpointCurve:
    """Prices the fixed rules of recomputation, and the best choices at budgets from the smallest that does to recomputing nothing.

    Args:
        workload: See `simtrain.estimate`.
        cluster: See `simtrain.estimate`.
        strategy: Its `checkpoint` does not matter.
        runtime: See `simtrain.estimate`.
        budgets: How many.

    Raises:
        UnsupportedError: A pipeline.
    """
    how = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    question = Question.of(resolve(workload, cluster, how.with_(checkpoint="optimal"), runtime))
    rules = RULES if question.setting.runtime.kernels.fused_attention else (*RULES, "selective")
    results = {rule: _priced(question.setting, rule) for rule in rules}
    smallest = question.text(question.smallest().spans)
    least, most = _priced(question.setting, smallest).memory.device_bytes, results["none"].memory.device_bytes
    chosen = [smallest]
    # the rules' own memory too, so that the best choice stands beside each of them
    for budget in sorted({*np.linspace(least, most, budgets)[1:].tolist(), *(r.memory.device_bytes for r in results.values())}):
        plan = question.within(budget * (1 + 1e-9))
        if plan is not None:
            chosen.append(question.text(plan.spans))
    points = [_point("optimal", text, _priced(question.setting, text)) for text in dict.fromkeys(chosen)]
    return CheckpointCurve(
        workload=question.setting.workload.name,
        cluster=question.setting.cluster.name,
        strategy=str(question.setting.strategy),
        capacity_bytes=question.capacity_bytes,
        rules=tuple(_point(rule, rule, result) for rule, result in results.items()),
        optimal=tuple(sorted(points, key=lambda p: p.device_bytes)),
        findings=(*findings(question), *_selective(results, points)),
    )


def _selective(results: dict[str, Result], points: list[CheckpointPoint]) -> tuple[str, ...]:
    """Says where recomputing the scores of attention alone, which is no choice of whole blocks, beats every such choice in its memory."""
    if (scores := results.get("selective")) is None:
        return ()
    within = [p.step_time_s for p in points if p.device_bytes <= scores.memory.device_bytes]
    if min(within, default=float("inf")) <= scores.step_time_s:
        return ()
    return ("checkpoint=selective beats every choice of whole blocks that takes no more memory: optimal does not look inside blocks",)


def _priced(setting: Setting, checkpoint: str) -> Result:
    return schedule_setting(replace(setting, strategy=setting.strategy.with_(checkpoint=checkpoint)))


def _point(name: str, checkpoint: str, result: Result) -> CheckpointPoint:
    return CheckpointPoint(name, checkpoint, result.step_time_s, result.memory.device_bytes, result.fits)


__all__ = ["CheckpointCurve", "CheckpointPoint", "checkpoint_curve", "choose_checkpoint"]
