"""What no allocation can beat, and how far a plan is from it."""

from __future__ import annotations

import numpy as np

from simtrain.core.errors import InternalError
from simtrain.planner.allocation.families import best_rates
from simtrain.planner.allocation.prices import Market


def layer_bound_s(market: Market) -> float:
    """Least time in which all passes of a step fit on the devices, layer by layer.

    A linear program: every layer processes every sample somewhere, at the least device-seconds that any unit and micro-batch size of that
    type takes; no device works longer than the answer. Bubbles, transfers, reduction, updates, memory and whole replicas are left out,
    all of which only add time.
    """
    from scipy.optimize import linprog

    kinds = [k for k, n in market.counts.items() if n > 0 and any(u.kind == k for u in market.units)]
    least = np.full((len(kinds), market.layers), np.inf)
    for (unit, size), price in market.prices.items():
        if unit.kind in kinds:
            k = kinds.index(unit.kind)
            least[k] = np.minimum(least[k], unit.tensor * price.least_s / size)
    # equal layers are one column
    columns, times = np.unique(least, axis=1, return_counts=True)
    n, m = columns.shape
    work = np.zeros((n, n * m + 1))
    for k, kind in enumerate(kinds):
        work[k, k * m : (k + 1) * m] = columns[k] * market.global_batch
        work[k, -1] = -float(market.counts[kind])
    whole = np.hstack([np.tile(np.eye(m), n), np.zeros((m, 1))])
    goal = np.append(np.zeros(n * m), 1.0)
    solved = linprog(goal, A_ub=work, b_ub=np.zeros(n), A_eq=whole, b_eq=times.astype(float), bounds=(0, None), method="highs")
    if not solved.success or solved.x is None:
        raise InternalError(f"the bound of an allocation was not found: {solved.message}")
    return float(solved.x[-1])


def replica_bound_s(market: Market) -> float:
    """The same where no replica mixes types: the global batch over the sum of the best rates of all devices."""
    rates = best_rates(market)
    return market.global_batch / sum(n * rates[kind] for kind, n in market.counts.items())


def check_bound(bound_s: float, step_time_s: float) -> None:
    """Stops where a bound contradicts the plan.

    Raises:
        InternalError: The plan is faster than what nothing can beat.
    """
    if bound_s > step_time_s * (1 + 1e-9):
        raise InternalError(f"a lower bound of {bound_s:.6g} s lies above the plan's own {step_time_s:.6g} s")
