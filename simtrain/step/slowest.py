"""The slowest of equal devices: boards of one kind differ, and those that work in step wait for the slowest of them.

Chips of one kind need different voltages for a clock, so that under one power limit they settle at different clocks. A board keeps its
place: it is as slow in every step, so the differences do not average out over micro-batches or steps, as those of jitter (drawn anew each
time, see `simtrain.step.simulate`) partly do. What arithmetic limits slows with the clock; what memory limits does not.

Tensor-parallel ranks wait for each other in every layer, the replicas of a stage once in a step: all that do the same work take the time
of the slowest among them, which for normal differences is `1 + spread x E[largest of n]` on average. Which stage of a pipeline then sets
the pace is for the readers to find. Against draws of every device (1F1B, 4 to 64 stages, 16 to 64 devices a stage) the arithmetic of
steps whose last stage is a few per cent longer comes out between 0.2 % too fast and 0.9 % too slow (stages fill and drain at their own
pace), that of steps of equal stages 0.1 to 1.9 % too fast (any of them may hold the slowest device of all).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.hardware import Device

POINTS = 4096
"""Quantiles by which an expected value is found."""


@lru_cache(maxsize=1024)
def expected_largest(count: int) -> float:
    """The expected largest of so many standard normal numbers, by quantiles of its distribution."""
    if count == 1:
        return 0.0
    middle = (np.arange(POINTS) + 0.5) / POINTS
    quantile = NormalDist().inv_cdf
    return float(np.mean([quantile(float(u)) for u in middle ** (1 / count)]))


def slowdown(device: Device, count: int) -> float:
    """How much longer the slowest of so many devices takes for what arithmetic limits than a typical one.

    Raises:
        InputError: A spread that cannot be.
    """
    spread = device.speed_spread
    if not (math.isfinite(spread) and 0 <= spread < 1):
        raise InputError(f"{device.name}: speed_spread is a relative standard deviation from 0 to below 1, not {spread!r}")
    return 1.0 + spread * expected_largest(count) if spread else 1.0


def slowdowns(devices: Iterable[Device]) -> dict[Device, float]:
    """The slowdown of each kind among devices that do the same work."""
    return {device: slowdown(device, count) for device, count in Counter(devices).items()}
