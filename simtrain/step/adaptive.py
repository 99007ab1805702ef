"""A number format for each layer: the fastest choice whose summed rounding error stays within a budget.

Each layer has a time and a squared error in each recipe, and squared errors add (`simtrain.step.rounding`): a knapsack in which every
layer takes one recipe. Steps from one recipe to a faster one are taken in the order of time saved per error added, over the convex hull of
each layer's recipes; stopping inside a step would be the optimum of the relaxed problem, so that what the choice loses is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import sqrt

from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from simtrain.core.hardware import Cluster
from simtrain.core.precision import ADAPTIVE, MIXABLE, PRECISIONS, format_layers, precision
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.step.costs import layer_pass_cost
from simtrain.step.layout import Lane, lay_out
from simtrain.step.occupancy import Mode
from simtrain.step.rounding import Exponents, layer_variance
from simtrain.step.setting import Setting, resolve
from simtrain.step.shard import Chunk

MOST_UNDERFLOW = 0.01
"""Share of a layer's gradients that may vanish before it falls back from fp16 (assumption; Micikevicius et al. 2018 trained an SSD on
which 31 % vanished unscaled, and which then diverged, recalled and not looked up)."""

LOSS_SCALE = 65536.0
"""Scale for which underflow is judged: the first of PyTorch's `GradScaler`."""


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """One recipe of one layer: seconds of a micro-batch's forward and backward pass, and the squared error it adds."""

    recipe: str
    time_s: float
    variance: float


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """Formats of layers within a budget.

    Attributes:
        strategy: With the layers' recipes in place of the budget.
        recipes: Of each layer, from the input on.
        error: Estimated relative error of the gradients.
        budget: What it had to stay within.
        time_s: Device time of the layers' passes over a micro-batch.
        bound_s: No choice within the budget takes less.
        fallbacks: Layers that underflow keeps from fp16, with the share of their gradients that would vanish.
    """

    strategy: Strategy
    recipes: tuple[str, ...]
    error: float
    budget: float
    time_s: float
    bound_s: float
    fallbacks: dict[int, float]

    @property
    def note(self) -> str:
        """The choice in words."""
        lost = self.time_s / self.bound_s - 1
        text = (
            f"formats of layers: {format_layers(self.recipes)}; gradients are estimated to be {self.error:.2g} off in the root mean square "
            f"(budget {self.budget:g}; independent roundings; small GPTs on a CPU were 0.25 to 2.1 times as far off); at most "
            f"{lost:.1%} slower than the best choice"
        )
        if self.fallbacks:
            text += f"; underflow keeps {len(self.fallbacks)} layers from fp16"
        return text


def choose_precision(
    workload: Workload | str,
    cluster: Cluster | str,
    strategy: Strategy | str,
    *,
    gradients: Sequence[Exponents] = (),
    runtime: Runtime | str | None = None,
) -> PrecisionPlan:
    """Chooses a recipe for each layer in place of `precision=adaptive:BUDGET`.

    Args:
        workload: See `simtrain.estimate`.
        cluster: See `simtrain.estimate`.
        strategy: With `precision=adaptive:0.01`, or another relative error of the gradients.
        gradients: Magnitudes that reach each layer (`simtrain.torch.gradient_exponents`), or of one for all; without them fp16 is left
            out, because nothing is known of underflow.
        runtime: See `simtrain.estimate`.

    Raises:
        StrategyError: The strategy has no budget, or one below what fp32 makes; the message names that.
        InputError: Gradients of another number of layers.
    """
    return _plan(resolve(workload, cluster, strategy, runtime), tuple(gradients))


def settle_precision(setting: Setting) -> Setting:
    """Puts recipes of layers in place of a budget; other settings stay as they are."""
    if setting.precision.budget is None:
        return setting
    plan = _plan(setting, ())
    recipe = precision(plan.strategy.precision)
    return replace(setting, strategy=plan.strategy, precision=recipe, notes=(*setting.notes, plan.note))


def _plan(setting: Setting, gradients: tuple[Exponents, ...]) -> PrecisionPlan:
    budget, depth = setting.precision.budget, setting.workload.depth
    if budget is None:
        raise StrategyError(f"precision={setting.precision.name} has no budget to choose within: give {ADAPTIVE}0.01")
    if len(gradients) not in (0, 1, depth):
        raise InputError(
            f"gradients are of {len(gradients)} layers, but {setting.workload.name} has {depth}: give one for each, or one for all"
        )
    each = gradients * depth if len(gradients) == 1 else gradients
    choices, fallbacks = _choices(setting, each)
    picked, bound_s = knapsack(choices, budget**2)
    recipes = tuple(c.recipe for c in picked)
    return PrecisionPlan(
        strategy=setting.strategy.with_(precision=format_layers(recipes)),
        recipes=recipes,
        error=sqrt(sum(c.variance for c in picked)),
        budget=budget,
        time_s=sum(c.time_s for c in picked),
        bound_s=bound_s,
        fallbacks=fallbacks,
    )


def _choices(setting: Setting, gradients: Sequence[Exponents]) -> tuple[list[list[LayerChoice]], dict[int, float]]:
    """Recipes of each layer that every device has, and the layers that underflow keeps from fp16."""
    choices: list[list[LayerChoice]] = [[] for _ in range(setting.workload.depth)]
    fallbacks: dict[int, float] = {}
    for name in MIXABLE:
        recipe = PRECISIONS[name]
        if any(recipe.arithmetic not in d.peak_flops for d in setting.devices) or (recipe.loss_scaling and not gradients):
            continue
        plain = replace(setting, precision=recipe, strategy=setting.strategy.with_(precision=name))
        for at, (time_s, rounding) in enumerate(_layers(plain)):
            lost = gradients[at].underflow(LOSS_SCALE) if recipe.loss_scaling else 0.0
            if lost > MOST_UNDERFLOW:
                fallbacks[at] = lost
                continue
            lower_end = gradients[at].variance(LOSS_SCALE) if recipe.loss_scaling else 0.0
            choices[at].append(LayerChoice(name, time_s, rounding + lower_end))
    return choices, fallbacks


def _layers(setting: Setting) -> list[tuple[float, float]]:
    """Seconds and squared error of each layer of the model, on the slowest device that runs it."""
    found: dict[int, tuple[float, float]] = {}
    for lane in lay_out(setting).lanes:
        for chunk in lane.chunks:
            at = chunk.start
            for layer, pair in zip(chunk.workload.layers, _chunk_layers(lane, chunk), strict=True):
                found |= {i: max(found.get(i, (0.0, 0.0)), pair) for i in range(at, at + layer.repeats)}
                at += layer.repeats
    return [found[at] for at in sorted(found)]


def _chunk_layers(lane: Lane, chunk: Chunk) -> list[tuple[float, float]]:
    rows = []
    for concrete in chunk.concrete:
        passes = [
            layer_pass_cost(lane.place, concrete, mode, False, accumulates=False, copies_to_buckets=False)
            for mode in (Mode.FORWARD, Mode.BACKWARD)
        ]
        time_s = max(sum(p.device_s for p in passes), sum(p.host_s for p in passes))
        rows.append((time_s, layer_variance(concrete, lane.place.batch, lane.place.sequence)))
    return rows


def knapsack(choices: Sequence[Sequence[LayerChoice]], budget: float) -> tuple[list[LayerChoice], float]:
    """Picks one choice for each layer: little time, variances that sum to at most the budget. Returns them and a lower bound of their time.

    Raises:
        StrategyError: The most exact choices are beyond the budget.
    """
    hulls = [_hull(own) for own in choices]
    at = [0] * len(hulls)
    spent, time_s = sum(h[0].variance for h in hulls), sum(h[0].time_s for h in hulls)
    if spent > budget:
        raise StrategyError(
            f"precision={ADAPTIVE}{sqrt(budget):g}: the most exact formats that the devices have leave an error of {sqrt(spent):.3g}; "
            "give at least that"
        )
    steps = [
        ((a.time_s - b.time_s) / (b.variance - a.variance), layer, i)
        for layer, hull in enumerate(hulls)
        for i, (a, b) in enumerate(pairwise(hull))
    ]
    bound_s: float | None = None
    for rate, layer, i in sorted(steps, key=lambda s: (-s[0], s[1], s[2])):
        a, b = hulls[layer][i], hulls[layer][i + 1]
        more = b.variance - a.variance
        if bound_s is None and spent + more > budget:
            bound_s = time_s - rate * (budget - spent)
        if at[layer] == i and spent + more <= budget:
            at[layer], spent, time_s = i + 1, spent + more, time_s + b.time_s - a.time_s
    return [hull[i] for hull, i in zip(hulls, at, strict=True)], time_s if bound_s is None else bound_s


def _hull(choices: Sequence[LayerChoice]) -> list[LayerChoice]:
    """Choices in the order of rising error and falling time of which no mixture of two others is better than a third."""
    kept: list[LayerChoice] = []
    for choice in sorted(choices, key=lambda c: (c.variance, c.time_s)):
        if kept and choice.time_s >= kept[-1].time_s:
            continue
        while len(kept) > 1 and _rate(kept[-2], kept[-1]) <= _rate(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    if not kept:
        raise UnsupportedError("no recipe of a layer has arithmetic on every device")
    return kept


def _rate(a: LayerChoice, b: LayerChoice) -> float:
    return (a.time_s - b.time_s) / (b.variance - a.variance)


__all__ = ["LayerChoice", "PrecisionPlan", "choose_precision", "knapsack", "settle_precision"]
