"""How many copies of each template, and what share of the batch each processes.

At a finishing time theta a template processes `size x floor((theta - fill) / period)` samples. The most samples that the devices can
process until then is a knapsack for each type (pipelines of one type) joined by copies of one template of several types. Bisection
finds the least theta that suffices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray
from simtrain.planner.allocation.families import Family
from simtrain.planner.allocation.prices import Market, Share

PRECISION = 1e-3
"""Relative, of the bisection."""

Chosen = list[tuple[int, int]]
"""Index of a template and its copies."""


@dataclass(frozen=True, slots=True, eq=False)
class _Shapes:
    """A family sorted by what its templates take.

    Attributes:
        single: Templates of one type, by type and by number of devices.
        mixed: Templates of several types, by what they take of each.
    """

    single: Mapping[str, Mapping[int, list[int]]]
    mixed: Mapping[tuple[int, ...], list[int]]


def _shapes(market: Market, family: Family) -> _Shapes:
    single: dict[str, dict[int, list[int]]] = {kind: {} for kind in market.counts}
    mixed: dict[tuple[int, ...], list[int]] = {}
    for i, need in enumerate(family.needs):
        if len(need) == 1:
            ((kind, taken),) = need.items()
            single[kind].setdefault(taken, []).append(i)
        else:
            mixed.setdefault(tuple(need.get(kind, 0) for kind in market.counts), []).append(i)
    return _Shapes(single, mixed)


def least_time(market: Market, family: Family, below_s: float) -> tuple[float, Chosen] | None:
    """The least finishing time of the passes, and the copies that reach it; `None` if none below `below_s` does."""
    shapes = _shapes(market, family)
    high, chosen = below_s, _reaches(market, family, shapes, below_s)
    if chosen is None:
        return None
    low = 0.0
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        found = _reaches(market, family, shapes, middle)
        if found is None:
            low = middle
        else:
            high, chosen = middle, found
    return high, chosen


def _reaches(market: Market, family: Family, shapes: _Shapes, theta_s: float) -> Chosen | None:
    """Copies that process the global batch until theta, or `None`."""
    if not family.templates:
        return None
    sizes = np.array([t.micro_batch for t in family.templates])
    samples = sizes * np.maximum(np.floor((theta_s - family.fill_s) / family.period_s + 1e-9), 0)
    sacks = {kind: _sack(n, shapes.single[kind], samples) for kind, n in market.counts.items()}
    counts = tuple(market.counts.values())
    alone = sum(sack[0][n] for sack, n in zip(sacks.values(), counts, strict=True))
    best, picked = alone, (-1, 0)
    for taken, members in shapes.mixed.items():
        index = max(members, key=lambda i: samples[i])
        most = min(n // t for n, t in zip(counts, taken, strict=True) if t)
        copies = np.arange(1, most + 1)
        if not len(copies) or not samples[index]:
            continue
        total = copies * samples[index]
        for (values, _), n, t in zip(sacks.values(), counts, taken, strict=True):
            total = total + values[n - copies * t]
        at = int(np.argmax(total))
        if total[at] > best:
            best, picked = float(total[at]), (index, int(copies[at]))
    if best < market.global_batch:
        return None
    taken = tuple(family.needs[picked[0]].get(kind, 0) * picked[1] if picked[1] else 0 for kind in market.counts)
    chosen: Chosen = [picked] if picked[1] else []
    for (_, choice), n, t in zip(sacks.values(), counts, taken, strict=True):
        chosen += _unpacked(choice, family, n - t)
    return chosen


def _sack(devices: int, by_size: Mapping[int, list[int]], samples: FloatArray) -> tuple[FloatArray, list[int]]:
    """Most samples of so many devices or fewer, and the template that is taken last (-1: one device stays idle)."""
    items = [(n, max(members, key=lambda i: samples[i])) for n, members in by_size.items()]
    items = [(n, i) for n, i in items if samples[i] > 0]
    value, choice = [0.0] * (devices + 1), [-1] * (devices + 1)
    worth = [(n, i, float(samples[i])) for n, i in items]
    for n in range(1, devices + 1):
        best, pick = value[n - 1], -1
        for size, i, gain in worth:
            if size <= n and value[n - size] + gain > best:
                best, pick = value[n - size] + gain, i
        value[n], choice[n] = best, pick
    return np.array(value), choice


def _unpacked(choice: list[int], family: Family, devices: int) -> Chosen:
    copies: dict[int, int] = {}
    n = devices
    while n > 0:
        i = choice[n]
        if i < 0:
            n -= 1
            continue
        copies[i] = copies.get(i, 0) + 1
        template = family.templates[i]
        n -= sum(s.unit.tensor for s in template.stages)
    return list(copies.items())


def shares(market: Market, family: Family, chosen: Chosen) -> tuple[Share, ...] | None:
    """Micro-batches of every copy, so that together they process the global batch exactly and the last ends as early as can be.

    Starts from what every replica can do until the time at which all together can do enough, then gives back what is too much, latest
    first. Returns `None` where micro-batch sizes do not add up to the global batch.
    """
    owner = np.repeat(np.array([i for i, _ in chosen], dtype=np.int64), [n for _, n in chosen])
    size = np.array([family.templates[i].micro_batch for i in owner])
    fill, period = family.fill_s[owner], family.period_s[owner]
    low, high = 0.0, float(np.max(fill + period * market.global_batch))
    for _ in range(60):
        middle = (low + high) / 2
        enough = (size * np.maximum(np.floor((middle - fill) / period + 1e-9), 0)).sum() >= market.global_batch
        low, high = (low, middle) if enough else (middle, high)
    number = np.maximum(np.floor((high - fill) / period + 1e-9), 0).astype(np.int64)
    surplus = int((size * number).sum()) - market.global_batch
    while surplus > 0:
        free = np.flatnonzero((number > 0) & (size <= surplus))
        if not len(free):
            other = _exchanged(family, owner, size * number, surplus)
            if other is None:
                return None
            replica, index, count = other
            owner[replica], number[replica] = index, count
            break
        latest = int(free[np.argmax(fill[free] + period[free] * number[free])])
        number[latest] -= 1
        surplus -= int(size[latest])
    found: dict[tuple[int, int], int] = {}
    for i, m in zip(owner.tolist(), number.tolist(), strict=True):
        if m:
            found[i, m] = found.get((i, m), 0) + 1
    return tuple(Share(family.templates[i], n, m) for (i, m), n in found.items())


def _exchanged(family: Family, owner: IntArray, samples: IntArray, surplus: int) -> tuple[int, int, int] | None:
    """A replica that another template on the same devices lets process `surplus` samples fewer, that template, and its micro-batches.

    The one that ends first is taken; `None` if there is none.
    """
    taken = [tuple((s.unit.kind, s.unit.tensor) for s in t.stages) for t in family.templates]
    devices = [tuple(sorted((kind, sum(w for k, w in own if k == kind)) for kind in {k for k, _ in own})) for own in taken]
    best: tuple[float, int, int, int] | None = None
    for replica in dict(zip(zip(owner.tolist(), samples.tolist(), strict=True), range(len(owner)), strict=True)).values():
        target = int(samples[replica]) - surplus
        for i, template in enumerate(family.templates):
            if devices[i] == devices[owner[replica]] and target >= 0 and target % template.micro_batch == 0:
                count = target // template.micro_batch
                ends = float(family.fill_s[i] + family.period_s[i] * count)
                if best is None or ends < best[0]:
                    best = (ends, replica, i, count)
    return best[1:] if best else None
