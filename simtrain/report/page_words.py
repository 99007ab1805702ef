"""A prediction in sentences, for people who read before they look at figures."""

from __future__ import annotations

import re

from simtrain.core.errors import StrategyError
from simtrain.core.result import Result
from simtrain.core.strategy import Strategy
from simtrain.core.units import format_bytes, format_time
from simtrain.planner.found import Plan
from simtrain.planner.launchers import launchers_of

ZERO = {1: "the optimizer's states", 2: "the optimizer's states and gradients", 3: "parameters, gradients and the optimizer's states"}
PRECISIONS = {
    "bf16-amp": "bf16 by autocast over fp32 weights",
    "fp16-amp": "fp16 by autocast over fp32 weights",
    "bf16-master": "bf16 with the optimizer on fp32 copies of the weights",
    "fp16-master": "fp16 with the optimizer on fp32 copies of the weights",
    "tf32": "tf32 on fp32 weights",
}
_MOMENT = re.compile(r"(\d+)/([^/]+)/([^/]+)/(.+)")
_DAY_S, _HOUR_S = 86400.0, 3600.0


def strategy_in_words(result: Result) -> list[str]:
    """Says how a strategy trains, one sentence for each choice."""
    try:
        s = Strategy.parse(result.strategy)
    except StrategyError:  # replicas stated in full have no text to read back
        return [f"Replicas as stated: {result.strategy}."]
    sentences = [_devices(s), _micro_batches(s)]
    held = {"none": "Every activation is kept for the backward pass", "full": "Every block is recomputed in the backward pass"}
    numbers = PRECISIONS.get(s.precision, s.precision)
    kept = held.get(s.checkpoint, f"Recomputation: {s.checkpoint}")
    sentences.append(f"{kept}. Arithmetic is {numbers}, the optimizer is {s.optimizer}.")
    if s.zero and s.data * s.context > 1:
        over = f"over groups of {s.shard} ranks" if s.shard else "over all ranks that hold the same part of the model"
        sentences.append(f"ZeRO {s.zero} divides {ZERO[s.zero]} {over}.")
    return sentences


def _devices(s: Strategy) -> str:
    if s.ranks == 1:
        return "One device does everything."
    ways = [
        (s.tensor, "ways inside each layer" + (" and its sequence" if s.sequence_parallel else "")),
        (s.pipeline, f"pipeline stages under {s.schedule}" + (f" with {s.chunks} chunks each" if s.chunks > 1 else "")),
        (s.context, "parts of each sequence"),
        (s.expert, "groups of experts"),
    ]
    divided = [f"{degree} {how}" for degree, how in ways if degree > 1]
    replicas = f"{s.data} replicas of the model" if s.data > 1 else "One replica of the model"
    if not divided:
        return f"{replicas}, one on each of {s.ranks} devices."
    return f"{replicas} on {s.ranks} devices, {'each divided' if s.data > 1 else 'divided'} into {', '.join(divided)}."


def _micro_batches(s: Strategy) -> str:
    samples = "1 sample" if s.micro_batch == 1 else f"{s.micro_batch} samples"
    batches = "one micro-batch" if s.accumulation == 1 else f"{s.accumulation:,} micro-batches"
    return f"Each works through {batches} of {samples} for a step of {s.global_batch:,} samples."


def verdict(result: Result) -> str:
    """Says how fast, and whether it fits."""
    memory = result.memory
    speed = f"A step takes {format_time(result.step_time_s)} and trains {number(result.tokens_per_s)} tokens a second"
    use = f"{result.mfu:.0%} of what the devices' arithmetic could do"
    fit = (
        f"At its fullest a device holds {format_bytes(memory.device_bytes)} of {format_bytes(memory.capacity_bytes)}"
        if memory.fits
        else f"It does not fit: {format_bytes(memory.device_bytes)} are needed where a device has {format_bytes(memory.capacity_bytes)}"
    )
    return f"{speed}, {use}. {fit}, {moment_in_words(memory.peak_moment)}."


def moment_in_words(moment: str) -> str:
    """Says of a label such as `0/forward/head.33/losses` when that is."""
    found = _MOMENT.fullmatch(moment)
    if found is None:
        return f"at {moment}"
    micro_batch, way, layer, operator = found.groups()
    kind, _, rest = way.partition(",")
    return f"in the {kind} pass of micro-batch {micro_batch}{f' ({rest.strip()})' if rest else ''}, at {operator} of {layer}"


def time_goes(result: Result) -> str:
    """Says what the step spends its time on, largest first."""
    parts = sorted(result.breakdown_s.items(), key=lambda item: -item[1])
    shown = [f"{name} {time_s / result.step_time_s:.0%}" for name, time_s in parts if time_s > 0.01 * result.step_time_s]
    return f"Of the step's time {', '.join(shown)}."


def money(result: Result) -> str:
    """Says what a billion tokens take in time, energy and money."""
    if not result.tokens_per_s:
        return ""
    seconds = 1e9 / result.tokens_per_s
    length = f"{seconds / _DAY_S:.1f} days" if seconds > 2 * _DAY_S else f"{seconds / _HOUR_S:.1f} hours"
    words = f"A billion tokens take {length} and {seconds * result.power_w / 3.6e6:,.0f} kWh"
    if result.cost_usd:
        words += f", {number(seconds * result.cost_usd / result.step_time_s)} USD"
    return words + " if nothing fails."


def second_best(plan: Plan) -> str:
    """Says how near the next is."""
    if len(plan.ranked) < 2 or plan.objective not in ("throughput", "step_time"):
        return ""
    best, second = plan.ranked[:2]
    behind = best.samples_per_s / second.samples_per_s - 1
    close = ", less than predictions can tell apart" if behind < 0.03 else ""
    return f"The runner-up, {second.strategy.replace(',', ', ')}, is {behind:.1%} slower{close}."


def runtimes_in_words(plan: Plan) -> str:
    """Says what carries the best out, and what is lost with anything else."""
    if len(plan.by_runtime) < 2:
        return ""
    (best, *others) = plan.by_runtime.values()
    said = f"That takes {_carried(best.runtime)}"
    if others and plan.objective in ("throughput", "step_time"):
        parts = [
            f"under {_carried(r.runtime)} the best is {best.samples_per_s / r.samples_per_s - 1:.0%} slower "
            f"({r.strategy.replace(',', ', ')}, {format_time(r.step_time_s)} a step)"
            for r in others
        ]
        said += "; " + "; ".join(parts)
    return said + "."


def _carried(runtime: str) -> str:
    launchers = " or ".join(launchers_of(runtime))
    return f"the runtime {runtime}" + (f" (--emit {launchers})" if launchers else "")


def search_in_words(plan: Plan) -> str:
    """Says what was looked at."""
    words = f"{plan.considered:,} strategies were considered in {format_time(plan.elapsed_s)}"
    words += f": {len(plan.ranked):,} that fit were read and ranked"
    if plan.failed:
        words += f", {len(plan.failed):,} do not fit or cannot be"
    if plan.unlisted:
        words += f", {plan.unlisted:,} more are too large for memory and not listed"
    if plan.passed_over:
        words += f", {plan.passed_over:,} are outpaced by a bound or a projection"
    return f"{words}. {'. '.join(n[0].upper() + n[1:] for n in plan.notes)}".rstrip(". ") + "."


def number(value: float) -> str:
    """A number of three digits, with separators where it is large."""
    if value >= 1e9:
        return f"{value / 1e9:,.3g} billion"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
