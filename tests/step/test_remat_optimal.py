"""Plans of recomputation against exhaustive search, closed forms and independent solvers."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simtrain.core.errors import StrategyError
from simtrain.step import remat_search
from simtrain.step.remat_optimal import Chain, Span, least_budget_bytes, optimal_segments, peak_bytes
from tests.step.chains import chain, uniform


def every_plan(n: int):
    """All ways to cut n layers into segments and to keep or recompute each."""
    for cuts in product([False, True], repeat=n - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        pieces = list(pairwise(edges))
        for choice in product([False, True], repeat=len(pieces)):
            yield [Span(a, b, recomputed=r) for (a, b), r in zip(pieces, choice, strict=True)]


def added_s(layers: Chain, spans) -> float:
    return sum(layers.forward_s[a : b - 1].sum() + layers.last_s[b - 1] for a, b, recomputed in spans if recomputed)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("n", [1, 3, 6])
def test_against_every_plan(n, seed):
    layers = chain(n, seed, recomputable=seed % 2 == 0)
    plans = [p for p in every_plan(n) if all(layers.recomputable[a:b].all() for a, b, r in p if r)]
    table = [(peak_bytes(layers, p), added_s(layers, p)) for p in plans]
    smallest = min(peak for peak, _ in table)
    assert least_budget_bytes(layers) == pytest.approx(smallest)
    for budget in sorted({peak for peak, _ in table}):
        best = min(cost for peak, cost in table if peak <= budget)
        plan = optimal_segments(layers, budget)
        assert plan.added_s == pytest.approx(best)
        assert plan.bound_s == plan.added_s
        assert plan.peak_bytes <= budget + 1e-9
        assert plan.added_s == pytest.approx(added_s(layers, plan.spans))
    with pytest.raises(StrategyError, match="the smallest takes"):
        optimal_segments(layers, smallest * 0.999)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(0, 10**6), st.floats(0, 1))
def test_plans_fit_and_cover_the_chain(n, seed, part):
    layers = chain(n, seed, recomputable=False)
    most = peak_bytes(layers, [Span(i, i + 1, recomputed=False) for i in range(n)])
    budget = least_budget_bytes(layers) * (1 - part) + most * part
    plan = optimal_segments(layers, budget * (1 + 1e-12))
    assert [s.start for s in plan.spans] == [0, *(s.stop for s in plan.spans[:-1])]
    assert plan.spans[-1].stop == n
    assert plan.peak_bytes <= budget * (1 + 1e-9)
    assert plan.bound_s <= plan.added_s + 1e-9
    assert all(layers.recomputable[s.start : s.stop].all() for s in plan.spans if s.recomputed)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_more_memory_never_costs_time(n, seed):
    layers = chain(n, seed)
    low, high = least_budget_bytes(layers), peak_bytes(layers, [Span(i, i + 1, recomputed=False) for i in range(n)])
    costs = [optimal_segments(layers, low + (high - low) * k / 6 + 1e-6).added_s for k in range(7)]
    assert all(b <= a + 1e-9 for a, b in pairwise(costs))
    assert costs[-1] == 0.0


@pytest.mark.parametrize("n", [16, 36, 64])
def test_square_root_segments_are_the_least_memory_of_equal_layers(n):
    """Chen et al. 2016: inputs of the segments and the inside of one, 2 sqrt(n) activations where a layer saves only its input."""
    layers = uniform(n, saved=0.0)
    root = round(np.sqrt(n))
    spans = [Span(a, a + root, recomputed=True) for a in range(0, n, root)]
    assert peak_bytes(layers, spans) == 2 * root
    least = least_budget_bytes(layers)
    assert least <= 2 * root  # the last segments may be longer than the first
    assert optimal_segments(layers, 2 * root).added_s <= n


def test_thinned_plans_carry_a_bound(monkeypatch):
    layers = chain(40, 7)
    budget = (least_budget_bytes(layers) + peak_bytes(layers, [Span(i, i + 1, recomputed=False) for i in range(40)])) / 2
    exact = optimal_segments(layers, budget)
    assert exact.bound_s == exact.added_s
    monkeypatch.setattr(remat_search, "LABELS", 12)
    thin = optimal_segments(layers, budget)
    assert thin.peak_bytes <= budget
    assert thin.bound_s <= exact.added_s <= thin.added_s
