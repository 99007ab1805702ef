"""How flows share resources: max-min fair rates by progressive filling (Bertsekas and Gallager, Data Networks, 1992, section 6.5).

All flows speed up together until a resource is full or a flow reaches its own limit; what that stops stays, the others go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

FULL = 1e-12
"""Share of a resource's capacity below which what is left of it counts as nothing (rounding)."""


def max_min_rates(demand: csr_array, capacities: FloatArray, rate_caps: FloatArray) -> FloatArray:
    """Returns the rate of each flow, in flows per second.

    What is shared fairly is the rate of a flow's largest demand (bytes per second over its busiest link), so that two messages on one
    link get the same part of it whatever their sizes.

    Args:
        demand: Amount of each resource (columns) that each flow (rows) needs in all.
        capacities: Units per second of each resource.
        rate_caps: Rate of each flow that nothing can exceed, such as one over its shortest duration; `inf` for no limit.

    Raises:
        InputError: Shapes do not agree, a capacity that is demanded is not positive, a demand or a cap is negative or not a number.
    """
    flows, resources = demand.shape
    amounts = np.asarray(demand.data, dtype=np.float64)
    used = np.asarray(demand.indices)
    if capacities.shape != (resources,) or rate_caps.shape != (flows,):
        raise InputError(f"{flows} flows over {resources} resources need {flows} rate caps and {resources} capacities")
    if not (np.all(amounts >= 0) and np.all(np.isfinite(amounts)) and np.all(rate_caps >= 0)):
        raise InputError("demands and rate caps must be numbers that are not negative")
    if not np.all(capacities[used[amounts > 0]] > 0):
        raise InputError("a resource without capacity is demanded: every link in use needs a bandwidth")
    owner = np.repeat(np.arange(flows), np.diff(demand.indptr))
    largest = np.zeros(flows)
    np.maximum.at(largest, owner, amounts)
    demanding = largest > 0
    speed = np.where(demanding, 1.0 / np.where(demanding, largest, 1.0), 0.0)
    caps = np.where(demanding, rate_caps * largest, 0.0)
    levels = _fill(owner, used, amounts * speed[owner], np.asarray(capacities, dtype=np.float64), caps, demanding)
    return np.where(demanding, levels * speed, rate_caps)


def _fill(
    owner: np.ndarray, used: np.ndarray, pull: FloatArray, capacities: FloatArray, caps: FloatArray, rising: np.ndarray
) -> FloatArray:
    """Raises the level of all flows together; `pull` is what one unit of a flow's level takes from a resource."""
    left, level, levels = capacities.copy(), 0.0, np.zeros(len(caps))
    rising = rising.copy()
    while rising.any():
        pulled = np.bincount(used, pull * rising[owner], len(capacities))
        busy = pulled > 0
        rise = float(np.min(caps[rising])) - level
        room = left[busy] / pulled[busy]
        rise = max(min(rise, float(room.min())), 0.0)
        level += rise
        left -= pulled * rise
        levels[rising] = level
        full = busy & (left <= FULL * capacities)
        stopped = caps <= level * (1 + FULL)
        stopped[owner[full[used] & (pull > 0)]] = True
        rising &= ~stopped
    return levels
