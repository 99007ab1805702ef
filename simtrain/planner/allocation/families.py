"""Templates worth having: pipelines of one, two or three device types, cut exactly for several caps on gradients, poor ones dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

from simtrain.core.polynomial import FloatArray
from simtrain.planner.allocation.events import affine
from simtrain.planner.allocation.prices import LayerPrices, Market, Template, Unit
from simtrain.planner.allocation.split import load_bytes, room, splits

MIXED_STAGES = 4
"""Most stages of each type in a pipeline of two types."""

THREE_TYPES_STAGES = 4
"""Most stages of a pipeline of three types."""

POOR = 0.62
"""A template is dropped whose devices would process less than this share of what they can at best, each alone."""

UNDIVIDED = 1.01
"""Templates whose tensor-parallel devices hold whole sequences are looked at only where dividing them takes longer by more than this."""

CAP_DIVISORS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Caps on the gradients of a device, as parts of the largest possible."""


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Templates with what the counts need to know of them.

    Attributes:
        templates: All of them.
        fill_s: Constant part of the finishing time.
        period_s: Part for each micro-batch.
        load_bytes: Most gradient bytes on a device.
        needs: Devices that a template takes, by kind.
    """

    templates: tuple[Template, ...]
    fill_s: FloatArray
    period_s: FloatArray
    load_bytes: FloatArray
    needs: tuple[Mapping[str, int], ...]

    def under(self, cap: float) -> Family:
        """Those that keep to a cap on gradients."""
        return self.chosen(self.load_bytes <= cap * (1 + 1e-9))

    def beside(self, other: Family) -> Family:
        """Those of another family behind these."""
        fill, period, load = (np.concatenate([getattr(f, n) for f in (self, other)]) for n in ("fill_s", "period_s", "load_bytes"))
        return Family((*self.templates, *other.templates), fill, period, load, (*self.needs, *other.needs))

    def chosen(self, which: Sequence[bool] | NDArray[np.bool_]) -> Family:
        """Some of them."""
        kept = np.flatnonzero(which)
        templates, needs = tuple(self.templates[i] for i in kept.tolist()), tuple(self.needs[i] for i in kept.tolist())
        return Family(templates, self.fill_s[kept], self.period_s[kept], self.load_bytes[kept], needs)


def lean(market: Market) -> Market:
    """Leaves out undivided sequences at sizes of micro-batches at which dividing them is about as fast or faster and saves memory."""
    whole = {(u, size): (u._replace(sequence=True), size) for u, size in market.prices if u.tensor > 1 and not u.sequence}
    kept = {
        size
        for (unit, size), divided in whole.items()
        if divided not in market.prices or not _no_worse(market.prices[divided], market.prices[unit, size])
    }
    return replace(market, prices={key: p for key, p in market.prices.items() if key not in whole or key[1] in kept})


def _no_worse(divided: LayerPrices, whole: LayerPrices) -> bool:
    times = [float((p.forward_s + p.backward_s).sum()) for p in (divided, whole)]
    held = [float((p.fixed_bytes + p.kept_bytes).sum()) - p.spare_bytes for p in (divided, whole)]
    return times[0] <= UNDIVIDED * times[1] and held[0] <= held[1]


Cut = dict[object, list[Template | None]]
"""Pipelines that were cut before, by what decides the cut."""


def family(market: Market, cut: Cut | None = None) -> Family:
    """All templates worth having.

    Args:
        market: Prices.
        cut: What was cut under prices that differ in memory and updates alone; gets what is cut now.
    """
    done = {} if cut is None else cut
    caps = _caps(market)
    rate = _paced_rates(market)
    found: dict[Template, None] = {}
    for units in _structures(market):
        if any(sum(u.tensor for u in units if u.kind == k) > n for k, n in market.counts.items()):
            continue
        best = sum(u.tensor * rate[u.kind] for u in units)
        for size in market.micro_batches:
            if not all(market.variants(u, size) for u in set(units)):
                continue
            key = (units, size, room(market, units, size))
            if key not in done:
                done[key] = splits(market, units, size, caps)
            for template in done[key]:
                if template is not None and template not in found and _slowest_s(market, template) * POOR * best <= size:
                    found[template] = None
    templates = tuple(found)
    if not templates:
        return Family((), *(np.zeros(0),) * 3, ())
    line = affine(market, templates)
    loads = np.array([load_bytes(market, t) for t in templates])
    return Family(templates, line.fill_s, line.period_s, loads, tuple({k: t.devices(k) for k in t.kinds} for t in templates))


def _structures(market: Market) -> Iterator[tuple[Unit, ...]]:
    """Sequences of units: up to `most_stages` equal ones, or blocks of two or three types, one behind the other."""
    units = tuple({u.shape: u for u in reversed(market.units)}.values())[::-1]  # the cut chooses among a shape's units stage by stage
    for unit in units:
        for stages in range(1, min(market.most_stages, market.layers) + 1):
            yield (unit,) * stages
    most = min(MIXED_STAGES, market.most_stages - 1)
    for first in units:
        for second in units:
            if first.kind == second.kind or not _alike(first, second):
                continue
            for a in range(1, most + 1):
                for b in range(1, min(most, market.most_stages - a, market.layers - a) + 1):
                    yield (first,) * a + (second,) * b
    longest = min(THREE_TYPES_STAGES, market.most_stages, market.layers)
    blocks = [c for c in product(range(1, THREE_TYPES_STAGES), repeat=3) if sum(c) <= longest]
    for three in permutations(units, 3):
        if len({unit.kind for unit in three}) == 3 and _alike(*three):
            for lengths in blocks:
                yield tuple(unit for unit, n in zip(three, lengths, strict=True) for _ in range(n))


def _alike(*units: Unit) -> bool:
    """Whether the widths of a replica agree on what they hand on: whole activations, or parts of a sequence."""
    return len({unit.sequence for unit in units if unit.tensor > 1}) < 2


def best_rates(market: Market) -> dict[str, float]:
    """Most samples per second of a device of each type, with all layers on it and nothing but passes on the device."""
    return _rates(market, lambda price: price.least_s)


def _paced_rates(market: Market) -> dict[str, float]:
    """The same where hosts hold up their devices, as they do stages."""
    return _rates(market, lambda price: price.forward_s + price.backward_s)


def _rates(market: Market, passes_s: Callable[[LayerPrices], FloatArray]) -> dict[str, float]:
    rates = dict.fromkeys(market.counts, 0.0)
    for (unit, size), price in market.prices.items():
        rates[unit.kind] = max(rates[unit.kind], size / (unit.tensor * float(passes_s(price).sum())))
    return rates


def _caps(market: Market) -> FloatArray:
    whole = max(float(price.gradient_bytes.sum()) for price in market.prices.values())
    return np.array([whole / d for d in CAP_DIVISORS]) * (1 + 1e-9)


def _slowest_s(market: Market, template: Template) -> float:
    size = template.micro_batch
    return max(float(market.stage_s(s.unit, size)[s.start, s.end - 1]) for s in template.stages)
