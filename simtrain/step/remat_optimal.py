"""Which layers of a chain to recompute: the least added time within a memory budget.

A plan cuts the chain into segments. A kept segment saves what its backward pass needs; a recomputed segment saves its input alone and
runs forward once more, all of it, when backward arrives (Chen et al. 2016, arXiv 1604.06174, with segments of any length). Whatever
happens inside a segment happens on top of what the segments before it hold, and less held is never worse; so it is enough to carry, from
segment to segment, the pairs of bytes held and time added that no other pair beats in both (`remat_search`).

All functions are pure and know arrays only. `remat_bounds` has the bound over a wider class of plans, `remat_chain` makes a chain of a
workload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from simtrain.core.errors import InternalError, StrategyError
from simtrain.step.remat_plan import Chain, RematPlan, Span, peak_bytes
from simtrain.step.remat_search import Inside, best_within, can_fit, inside_of

AIMS = 8
"""Budgets that are tried where the plan for the whole budget holds too much while something waits for the loss."""

COMPROMISES = (0.25, 0.5, 0.75)
"""Shares of what waits for the loss, see `inside_of`, that are tried where neither all nor nothing gives a plan that fits."""


def optimal_segments(chain: Chain, budget_bytes: float) -> RematPlan:
    """Finds the segments that add least time within a budget.

    Exact unless a layer carries more than `LABELS` pairs that could still win, or casts of weights that wait for the loss matter in
    some layers and not in others; the plan fits in any case, and the bound is proven.

    Args:
        chain: The layers.
        budget_bytes: What may be held at once.

    Raises:
        StrategyError: No plan was found that fits; the message says what the smallest one takes.
    """
    bound_s, limit = 0.0, budget_bytes * (1 + 1e-12)
    for inside in _views(chain, ()):
        plan = best_within(chain, inside, budget_bytes)
        bound_s = max(bound_s, plan.bound_s if plan else np.inf)
        if plan is not None and plan.peak_bytes <= limit:
            return replace(plan, bound_s=min(max(bound_s, plan.bound_s), plan.added_s))
    best = _smallest(chain)
    if best.peak_bytes > limit:
        raise StrategyError(
            f"no choice of recomputed layers was found that fits {budget_bytes / 2**30:.3f} GiB; the smallest takes "
            f"{best.peak_bytes / 2**30:.3f} GiB: give more memory, or choose a smaller micro-batch"
        )
    for inside in _views(chain, COMPROMISES):
        low, high = _least(chain, inside), budget_bytes
        for _ in range(AIMS):
            plan = best_within(chain, inside, (low + high) / 2)
            fits = plan is not None and plan.peak_bytes <= limit
            low, high = ((low + high) / 2, high) if fits else (low, (low + high) / 2)
            best = plan if plan is not None and fits and plan.added_s < best.added_s else best
    return replace(best, bound_s=min(bound_s, best.added_s))


def _views(chain: Chain, between: tuple[float, ...]) -> Iterator[Inside]:
    """The chain as backward passes see it, as forward passes see it, and in between; one view where nothing waits for the loss."""
    yield inside_of(chain)
    if chain.dropping_until_loss_bytes.any():
        yield from (inside_of(chain, waiting) for waiting in (1.0, *between))


def least_budget_bytes(chain: Chain) -> float:
    """The smallest budget for which `optimal_segments` has a plan."""
    return _smallest(chain).peak_bytes


def _smallest(chain: Chain) -> RematPlan:
    plans = [best_within(chain, inside, _least(chain, inside)) for inside in _views(chain, COMPROMISES)]
    found = [plan for plan in plans if plan is not None]
    if not found:
        raise InternalError("the smallest plan of recomputation does not fit its own memory")
    return min(found, key=lambda plan: plan.peak_bytes)


def _least(chain: Chain, inside: Inside) -> float:
    """The smallest budget that fits, not counting what waits for the loss; to a relative 1e-10, from above."""
    low, high = 0.0, peak_bytes(chain, [Span(i, i + 1, recomputed=False) for i in range(len(chain))])
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if can_fit(inside, middle) else (middle, high)
    return high


__all__ = ["Chain", "RematPlan", "Span", "least_budget_bytes", "optimal_segments", "peak_bytes"]
