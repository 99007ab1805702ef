"""Which layers of a chain to recompute: the least added time within a memory budget.

A plan cuts the chain into segments. A kept segment saves what its backward pass needs; a recomputed segment saves its input alone and
runs forward once more, all of it, when backward arrives (Chen et al. 2016, arXiv 1604.06174, with segments of any length). Whatever
happens inside a segment happens on top of what the segments before it hold, and less held is never worse; so it is enough to carry, from
segment to segment, the pairs of bytes held and time added that no other pair beats in both. A price on memory (a Lagrange multiplier of the
budget) bounds from below what a pair can still become; pairs that cannot beat a plan already known are dropped, which leaves few.

All functions are pure and know arrays only. `remat_bounds` has the bound over a wider class of plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simtrain.core.errors import InternalError, StrategyError
from simtrain.core.polynomial import FloatArray

LABELS = 256
"""Pairs of bytes held and time added that are carried per layer. Beyond it the least promising go; what they could have become bounds
how far the plan is from the optimum."""

AIMS = 8
"""Budgets that are tried where the plan for the whole budget holds too much until the loss."""

FEW_LABELS = 32
"""The same of a first search, whose plan lets a second one drop more."""

PRICES = 24
"""Prices of memory that are tried at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Layers in forward order, each known by its times and by what it holds.

    Attributes:
        forward_s: Forward time of each layer; the time to recompute it inside a segment.
        last_s: Time to recompute it as the last of its segment (recomputation may stop early).
        input_bytes: Its input.
        output_gradient_bytes: The gradient of its output, which is there when its backward pass begins (0 for a layer that ends in the
            loss).
        saved_bytes: What it saves for backward, without its input.
        keeps_input: Whether its backward pass reads its input.
        forward_peak_bytes: The most that its forward pass holds beyond its input, if it saves.
        dropping_peak_bytes: The same if it saves nothing.
        backward_peak_bytes: The most that its backward pass holds beyond what is there when it begins (input, what is saved, and the
            gradient of its output).
        left_bytes: What its backward pass leaves behind (gradients of parameters).
        recomputable: Whether it may run forward twice.
        until_loss_bytes: What it holds from its forward pass until all layers have run forward, if it is kept (casts of weights that
            autocast caches), beyond what it saves.
        dropping_until_loss_bytes: The same if it is recomputed.
    """

    forward_s: FloatArray
    last_s: FloatArray
    input_bytes: FloatArray
    output_gradient_bytes: FloatArray
    saved_bytes: FloatArray
    keeps_input: NDArray[np.bool_]
    forward_peak_bytes: FloatArray
    dropping_peak_bytes: FloatArray
    backward_peak_bytes: FloatArray
    left_bytes: FloatArray
    recomputable: NDArray[np.bool_]
    until_loss_bytes: FloatArray
    dropping_until_loss_bytes: FloatArray

    def __len__(self) -> int:
        return len(self.forward_s)

    @property
    def kept_bytes(self) -> FloatArray:
        """What each layer holds from its forward to its backward pass if it is kept."""
        return self.saved_bytes + np.where(self.keeps_input, self.input_bytes, 0.0)

    @property
    def left_behind_bytes(self) -> FloatArray:
        """What the backward passes from each layer to the end have left, and 0 behind the last."""
        return np.append(np.cumsum(self.left_bytes[::-1])[::-1], 0.0)


class Span(NamedTuple):
    """Layers from `start` up to but not including `stop`, recomputed together or kept."""

    start: int
    stop: int
    recomputed: bool


@dataclass(frozen=True, slots=True)
class RematPlan:
    """What is recomputed.

    Attributes:
        spans: Segments in forward order.
        added_s: Time of the recomputation.
        peak_bytes: Most that is held at once.
        bound_s: No plan of segments within the budget adds less; equal to `added_s` where the plan is proven optimal.
    """

    spans: tuple[Span, ...]
    added_s: float
    peak_bytes: float
    bound_s: float


def peak_bytes(chain: Chain, spans: Sequence[Span]) -> float:
    """Replays forward and backward with a plan, allocating and releasing, and returns the most that is held."""
    x, saved, kept, gradient = (a.tolist() for a in (chain.input_bytes, chain.saved_bytes, chain.kept_bytes, chain.output_gradient_bytes))
    held, peak, until_loss = 0.0, 0.0, 0.0
    for start, stop, recomputed in spans:
        for i in range(start, stop):
            running = chain.dropping_peak_bytes[i] + (x[start] if i > start else 0.0) if recomputed else chain.forward_peak_bytes[i]
            peak = max(peak, held + until_loss + x[i] + running)
            held += 0.0 if recomputed else kept[i]
            until_loss += (chain.dropping_until_loss_bytes if recomputed else chain.until_loss_bytes)[i]
        held += x[start] if recomputed else 0.0
    for start, stop, recomputed in reversed(spans):
        if recomputed:
            for i in range(start, stop):
                peak = max(peak, held + gradient[stop - 1] + (x[i] if i > start else 0.0) + chain.forward_peak_bytes[i])
                held += kept[i] if i > start else saved[i]
        for i in reversed(range(start, stop)):
            peak = max(peak, held + gradient[i] + chain.backward_peak_bytes[i])
            held += chain.left_bytes[i] - (saved[i] if recomputed and i == start else kept[i])
        held -= x[start] if recomputed else 0.0
    return float(peak)


def optimal_segments(chain: Chain, budget_bytes: float) -> RematPlan:
    """Finds the segments that add least time within a budget.

    Exact unless a layer carries more than `LABELS` pairs that could still win; the plan fits in any case, and the bound is proven.

    Args:
        chain: The layers.
        budget_bytes: What may be held at once.

    Raises:
        StrategyError: No plan fits; the message says what the smallest one takes.
    """
    inside = _inside(chain)
    plan = _within(chain, inside, budget_bytes)
    if plan is not None and plan.peak_bytes <= budget_bytes * (1 + 1e-12):
        return plan
    bound_s, best = plan.bound_s if plan else np.inf, _smallest(chain, inside)
    if best.peak_bytes > budget_bytes * (1 + 1e-12):
        raise StrategyError(
            f"no choice of recomputed layers fits {budget_bytes / 2**30:.3f} GiB; the smallest takes {best.peak_bytes / 2**30:.3f} GiB: "
            "give more memory, or choose a smaller micro-batch"
        )
    # what waits for the loss is not in the search: aim lower, as little as will do
    low, high = _least(chain, inside), budget_bytes
    for _ in range(AIMS):
        plan = _within(chain, inside, (low + high) / 2)
        fits = plan is not None and plan.peak_bytes <= budget_bytes
        low, high = ((low + high) / 2, high) if fits else (low, (low + high) / 2)
        best = plan if plan is not None and fits and plan.added_s < best.added_s else best
    return replace(best, bound_s=min(bound_s, best.added_s))


def least_budget_bytes(chain: Chain) -> float:
    """The smallest budget for which `optimal_segments` has a plan."""
    return _smallest(chain, _inside(chain)).peak_bytes


def _within(chain: Chain, inside: _Inside, budget_bytes: float) -> RematPlan | None:
    """The best plan by what is held between forward and backward alone; its peak is that of a replay."""
    if not _fits(inside, budget_bytes):
        return None
    prices = _prices(chain, inside, budget_bytes)
    slack_s = 1e-9 * float(chain.forward_s.sum())  # rounding may not drop the best plan
    spans, added_s, bound_s = _search(inside, budget_bytes, prices, prices.known_s + slack_s, FEW_LABELS)
    if bound_s < added_s:
        spans, added_s, bound_s = _search(inside, budget_bytes, prices, added_s + slack_s, LABELS)
    return RematPlan(spans, added_s, peak_bytes(chain, spans), bound_s)


def _smallest(chain: Chain, inside: _Inside) -> RematPlan:
    plan = _within(chain, inside, _least(chain, inside))
    if plan is None:
        raise InternalError("the smallest plan of recomputation does not fit its own memory")
    return plan


def _least(chain: Chain, inside: _Inside) -> float:
    """The smallest budget that fits, not counting what waits for the loss; to a relative 1e-10, from above."""
    low, high = 0.0, peak_bytes(chain, [Span(i, i + 1, recomputed=False) for i in range(len(chain))])
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(inside, middle) else (middle, high)
    return high


@dataclass(frozen=True, slots=True, eq=False)
class _Inside:
    """Segments by start and stop, seen from what is held before them.

    Attributes:
        peak: Most that a recomputed segment holds on top; infinite where it may not be recomputed.
        cost: Time that recomputing it adds.
        hold: What it holds between its forward and its backward pass, by start.
        kept_peak: Most that a kept layer holds on top.
        kept_hold: What a kept layer holds.
    """

    peak: FloatArray
    cost: FloatArray
    hold: FloatArray
    kept_peak: FloatArray
    kept_hold: FloatArray


def _inside(chain: Chain) -> _Inside:
    n = len(chain)
    x, kept, gradient, left = chain.input_bytes, chain.kept_bytes, chain.output_gradient_bytes, chain.left_behind_bytes
    backward_top = gradient + chain.backward_peak_bytes + left[1:]
    peak, cost = np.full((n, n + 1), np.inf), np.zeros((n, n + 1))
    time = np.concatenate(([0.0], np.cumsum(chain.forward_s)))
    for a in np.flatnonzero(chain.recomputable).tolist():
        blocked = np.flatnonzero(~chain.recomputable[a:])
        b = a + int(blocked[0]) if len(blocked) else n
        own = kept[a:b].copy()
        own[0] = chain.saved_bytes[a]
        inner = x[a:b].copy()
        inner[0] = 0.0  # the input of the segment counts once
        filled = np.cumsum(own)
        first_pass = np.maximum.accumulate(inner + chain.dropping_peak_bytes[a:b])
        again = np.maximum.accumulate(filled - own + inner + chain.forward_peak_bytes[a:b]) + gradient[a:b] + left[a + 1 : b + 1]
        back = np.maximum.accumulate(filled + backward_top[a:b])
        peak[a, a + 1 : b + 1] = x[a] + np.maximum(first_pass, np.maximum(again, back))
        cost[a, a + 1 : b + 1] = time[a:b] - time[a] + chain.last_s[a:b]
    kept_peak = np.maximum(x + chain.forward_peak_bytes, kept + backward_top)
    return _Inside(peak, cost, x, kept_peak, kept)


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """Pairs that no other beats, by bytes held, with where each came from (layer, pair, kept or recomputed)."""

    held: FloatArray
    cost: FloatArray
    layer: NDArray[np.int64]
    pair: NDArray[np.int64]
    recomputed: NDArray[np.bool_]

    def only(self, chosen: NDArray[np.bool_] | slice) -> _Labels:
        return _Labels(self.held[chosen], self.cost[chosen], self.layer[chosen], self.pair[chosen], self.recomputed[chosen])


@dataclass(frozen=True, slots=True, eq=False)
class _Prices:
    """Lower bounds from prices on memory.

    Attributes:
        price: Seconds per byte held.
        rest: By layer and price, the least of time added and price of memory from this layer to the end.
        known_s: Time added by the best plan found this way; infinite if none fits.
    """

    price: FloatArray
    rest: FloatArray
    known_s: float

    def least_s(self, layer: int, held: FloatArray, cost: FloatArray, budget_bytes: float) -> FloatArray:
        """What pairs at a layer add to the end, at least."""
        to_come = self.rest[layer] - self.price * (budget_bytes - held[:, None])
        bound: FloatArray = cost + np.maximum(to_come.max(axis=1), 0.0)
        return bound


def _prices(chain: Chain, inside: _Inside, budget_bytes: float) -> _Prices:
    """Prices around the one with the best bound for the whole chain."""
    low, high = 1e-6, 1e6  # around the mean time per byte
    scale = max(float(chain.forward_s.mean()), 1e-30) / max(float(inside.kept_hold.mean()), 1e-30)
    known_s = np.inf
    for _ in range(4):
        price = np.append(0.0, scale * np.geomspace(low, high, PRICES))
        rest, choice = _priced(inside, budget_bytes, price)
        best = int(np.argmax(rest[0] - price * budget_bytes))
        for k in range(len(price)):
            spans = _follow(choice[:, k])
            if peak_bytes(chain, spans) <= budget_bytes:
                known_s = min(known_s, sum(float(inside.cost[a, b]) for a, b, recomputed in spans if recomputed))
        low, high = price[max(best - 1, 1)] / scale, price[min(best + 1, PRICES)] / scale
    return _Prices(price, rest, known_s)


def _priced(inside: _Inside, budget_bytes: float, price: FloatArray) -> tuple[FloatArray, NDArray[np.int64]]:
    """The cheapest way to the end from each layer at each price, and its first segment: its stop, or -1 for a kept layer.

    The last segment pays for all that it holds at its peak, because that must fit too.
    """
    n = len(inside.hold)
    rest, choice = np.zeros((n + 1, len(price))), np.full((n, len(price)), -1, dtype=np.int64)
    for a in reversed(range(n)):
        stops = a + 1 + np.flatnonzero(inside.peak[a, a + 1 :] <= budget_bytes)
        weight = np.where(stops < n, inside.hold[a], inside.peak[a, stops])
        recomputed = inside.cost[a, stops, None] + weight[:, None] * price + rest[stops]
        rest[a] = (inside.kept_hold[a] if a + 1 < n else inside.kept_peak[a]) * price + rest[a + 1]
        if len(stops):
            least = recomputed.argmin(axis=0)
            lower = recomputed[least, np.arange(len(price))]
            choice[a] = np.where(lower < rest[a], stops[least], -1)
            rest[a] = np.minimum(lower, rest[a])
    return rest, choice


def _follow(choice: NDArray[np.int64]) -> tuple[Span, ...]:
    spans: list[Span] = []
    at = 0
    while at < len(choice):
        stop = int(choice[at])
        spans.append(Span(at, stop if stop > 0 else at + 1, recomputed=stop > 0))
        at = spans[-1].stop
    return tuple(spans)


def _search(
    inside: _Inside, budget_bytes: float, prices: _Prices, best_s: float, labels_carried: int
) -> tuple[tuple[Span, ...], float, float]:
    """Spans, time added, and a lower bound on it; pairs that must end above `best_s` are dropped."""
    none = np.zeros(1, dtype=np.int64)
    labels = [_Labels(np.zeros(1), np.zeros(1), none, none, np.zeros(1, dtype=np.bool_))]
    last, dropped_s = len(inside.hold), np.inf
    for stop in range(1, last + 1):
        parts: list[tuple[int, int, float, float, bool]] = []
        starts = np.flatnonzero(inside.peak[:stop, stop] <= budget_bytes).tolist()
        options = [(a, inside.hold[a], inside.cost[a, stop], inside.peak[a, stop], True) for a in starts]
        options.append((stop - 1, inside.kept_hold[stop - 1], 0.0, inside.kept_peak[stop - 1], False))
        for a, holds, cost, top, recomputed in options:
            fitting = int(np.searchsorted(labels[a].held, budget_bytes - top, side="right"))
            if fitting:
                parts.append((a, fitting, holds, cost, recomputed))
        if not parts:
            labels.append(labels[0].only(slice(0)))
            continue
        best = _best(labels, parts)
        if stop < last:
            bound = prices.least_s(stop, best.held, best.cost, budget_bytes)
            chosen = bound <= best_s
            chosen[0] = True  # whoever holds least can always go on
            if chosen.sum() > labels_carried:
                worst = np.partition(bound[chosen], labels_carried)[labels_carried]
                out = chosen & (bound >= worst)
                out[0] = False
                dropped_s, chosen = min(dropped_s, float(worst)), chosen & ~out
            best = best.only(chosen)
        labels.append(best)
    added_s = float(labels[-1].cost[-1])
    return _trace(labels), added_s, min(added_s, dropped_s)


def _best(labels: list[_Labels], parts: list[tuple[int, int, float, float, bool]]) -> _Labels:
    """Extends the pairs of earlier layers and leaves those that no other beats, by bytes held upwards and time added downwards."""
    held = np.concatenate([labels[a].held[:k] + holds for a, k, holds, _, _ in parts])
    cost = np.concatenate([labels[a].cost[:k] + added for a, k, _, added, _ in parts])
    counts = [k for _, k, _, _, _ in parts]
    order = np.lexsort((cost, held))
    lowest = np.minimum.accumulate(cost[order])
    order = order[np.concatenate(([True], lowest[1:] < lowest[:-1]))]
    layer = np.repeat([a for a, *_ in parts], counts)
    pair = np.concatenate([np.arange(k) for k in counts])
    recomputed = np.repeat([part[-1] for part in parts], counts)
    return _Labels(held[order], cost[order], layer[order], pair[order], recomputed[order])


def _trace(labels: list[_Labels]) -> tuple[Span, ...]:
    spans: list[Span] = []
    stop, pair = len(labels) - 1, len(labels[-1].held) - 1
    while stop:
        here = labels[stop]
        start = int(here.layer[pair])
        spans.append(Span(start, stop, recomputed=bool(here.recomputed[pair])))
        stop, pair = start, int(here.pair[pair])
    return tuple(reversed(spans))


def _fits(inside: _Inside, budget_bytes: float) -> bool:
    """Whether some plan fits: the least that can be held before each layer decides."""
    least = np.full(len(inside.hold) + 1, np.inf)
    least[0] = 0.0
    for stop in range(1, len(least)):
        before = least[:stop]
        recomputed = np.where(before + inside.peak[:stop, stop] <= budget_bytes, before + inside.hold[:stop], np.inf).min()
        fits = least[stop - 1] + inside.kept_peak[stop - 1] <= budget_bytes
        least[stop] = min(recomputed, least[stop - 1] + inside.kept_hold[stop - 1] if fits else np.inf)
    return bool(np.isfinite(least[-1]))
