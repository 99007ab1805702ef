"""The search behind `remat_optimal`: pairs of bytes held and time added, from segment to segment.

A price on memory (a Lagrange multiplier of the budget) bounds from below what a pair can still become; pairs that cannot beat a plan
already known are dropped, which leaves few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simtrain.core.polynomial import FloatArray
from simtrain.step.remat_plan import Chain, RematPlan, Span, peak_bytes

LABELS = 256
"""Pairs of bytes held and time added that are carried per layer. Beyond it the least promising go; what they could have become bounds
how far the plan is from the optimum."""

FEW_LABELS = 32
"""The same of a first search, whose plan lets a second one drop more."""

PRICES = 24
"""Prices of memory that are tried at once."""


def best_within(chain: Chain, inside: Inside, budget_bytes: float) -> RematPlan | None:
    """The best plan by what is held between forward and backward alone; its peak is that of a replay."""
    if not can_fit(inside, budget_bytes):
        return None
    prices = _prices(chain, inside, budget_bytes)
    slack_s = 1e-9 * float(chain.forward_s.sum())  # rounding may not drop the best plan
    spans, added_s, bound_s = _search(inside, budget_bytes, prices, prices.known_s + slack_s, FEW_LABELS)
    if bound_s < added_s:
        spans, added_s, bound_s = _search(inside, budget_bytes, prices, added_s + slack_s, LABELS)
    return RematPlan(spans, added_s, peak_bytes(chain, spans), bound_s)


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
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


def inside_of(chain: Chain, waiting: float = 0.0) -> Inside:
    """Looks into every segment that may be recomputed, and every layer.

    Casts of weights wait for the loss, whether a layer is kept or recomputed; a kept layer saves them too. So forward passes have more
    beside them than backward passes, but one number is carried per plan. With 0 it is what backward passes find, and forward passes
    do not see what waits; with 1 it is what forward passes find, less the casts of all layers before, which are then added, and backward
    passes see too little. Either way no plan looks larger than it is.

    Args:
        chain: The layers.
        waiting: The share of what waits for the loss that forward passes see; between 0 and 1 plans are compromises.
    """
    casts = chain.dropping_until_loss_bytes
    beside = waiting * (np.cumsum(casts) - casts)
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
        first_pass = np.maximum.accumulate(inner + chain.dropping_peak_bytes[a:b] + beside[a:b])
        again = np.maximum.accumulate(filled - own + inner + chain.forward_peak_bytes[a:b]) + gradient[a:b] + left[a + 1 : b + 1]
        back = np.maximum.accumulate(filled + backward_top[a:b])
        peak[a, a + 1 : b + 1] = x[a] + np.maximum(first_pass, np.maximum(again, back))
        cost[a, a + 1 : b + 1] = time[a:b] - time[a] + chain.last_s[a:b]
    kept_peak = np.maximum(x + chain.forward_peak_bytes + beside, kept + backward_top)
    return Inside(peak, cost, x, kept_peak, kept - waiting * (casts - chain.until_loss_bytes))


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


def _prices(chain: Chain, inside: Inside, budget_bytes: float) -> _Prices:
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


def _priced(inside: Inside, budget_bytes: float, price: FloatArray) -> tuple[FloatArray, NDArray[np.int64]]:
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
    inside: Inside, budget_bytes: float, prices: _Prices, best_s: float, labels_carried: int
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


def can_fit(inside: Inside, budget_bytes: float) -> bool:
    """Whether some plan fits: the least that can be held before each layer decides."""
    least = np.full(len(inside.hold) + 1, np.inf)
    least[0] = 0.0
    for stop in range(1, len(least)):
        before = least[:stop]
        recomputed = np.where(before + inside.peak[:stop, stop] <= budget_bytes, before + inside.hold[:stop], np.inf).min()
        fits = least[stop - 1] + inside.kept_peak[stop - 1] <= budget_bytes
        least[stop] = min(recomputed, least[stop - 1] + inside.kept_hold[stop - 1] if fits else np.inf)
    return bool(np.isfinite(least[-1]))
