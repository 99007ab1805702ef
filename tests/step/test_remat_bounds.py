"""The bound over persistent plans and the integer program: closed forms, exhaustive search, and each other."""

import heapq
from math import comb

import numpy as np
import pytest

from simtrain.core.errors import InputError, InternalError, StrategyError
from simtrain.step.remat_bounds import persistent_added_s
from simtrain.step.remat_milp import Graph, optimal_graph, replay
from simtrain.step.remat_optimal import Chain, Span, least_budget_bytes, optimal_segments, peak_bytes
from tests.step.chains import chain, uniform


def binomial_advances(length: int, checkpoints: int) -> int:
    """Griewank and Walther 2000: the fewest forward steps that reverse a chain with so many states in memory, the first among them."""
    repetitions = 0
    while comb(checkpoints + repetitions, checkpoints) < length:
        repetitions += 1
    return repetitions * length - comb(checkpoints + repetitions, checkpoints + 1) if repetitions else 0


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 4, 5])
def test_equal_layers_take_the_binomial_optimum(checkpoints):
    """What a layer saves fits once, for the layer that goes backward; all else are inputs."""
    for length in range(1, 21):
        one, none = np.ones(length), np.zeros(length)
        layers = Chain(one, one, one, none, (checkpoints + 1) * one, one > 0, none, none, none, none, one > 0, none, none)
        budget = 2 * checkpoints + 2
        assert persistent_added_s(layers, budget, levels=budget) == binomial_advances(length, checkpoints)


@pytest.mark.parametrize("seed", range(10))
def test_segments_never_beat_the_bound(seed):
    layers = chain(9, seed, recomputable=seed % 2 == 0)
    least = least_budget_bytes(layers)
    most = peak_bytes(layers, [Span(i, i + 1, recomputed=False) for i in range(9)])
    for part in (0.0, 0.3, 0.7, 1.0):
        budget = round(least + part * (most - least))  # whole bytes, so that nothing is rounded
        added = optimal_segments(layers, budget).added_s
        bound = persistent_added_s(layers, budget, levels=int(budget))
        assert bound <= added + 1e-9
        assert persistent_added_s(layers, budget, levels=int(budget), optimistic=False) == pytest.approx(bound)
        coarse = [persistent_added_s(layers, budget, levels=40, optimistic=optimistic) for optimistic in (True, False)]
        assert coarse[0] - 1e-9 <= bound <= coarse[1] + 1e-9
    assert persistent_added_s(layers, most) == 0.0


def test_persistent_plans_need_less_memory_than_segments():
    """Chen et al. 2016, section 4.3: nested recomputation goes below the square root."""
    layers = uniform(36, saved=0.0)
    least = least_budget_bytes(layers)
    assert np.isfinite(persistent_added_s(layers, least - 1, levels=int(least - 1)))
    with pytest.raises(StrategyError):
        optimal_segments(layers, least - 1)


def test_long_chains_are_refused():
    with pytest.raises(StrategyError, match="up to 160 layers, not 200"):
        persistent_added_s(uniform(200), 50)


def training_graph(forward_s, result, gradient) -> Graph:
    """n forward nodes, then n backward nodes; backward i reads what forward i read, and the gradient from backward i + 1 (or the loss)."""
    n = len(forward_s)
    back = [2 * n - 1 - i for i in range(n)]
    edges = [(i, i + 1) for i in range(n)] + [(back[i + 1], back[i]) for i in range(n - 1)] + [(i - 1, back[i]) for i in range(1, n)]
    return Graph(np.concatenate((forward_s, np.ones(n))), np.concatenate((result, gradient[::-1])), tuple(dict.fromkeys(edges)))


def cheapest(graph: Graph, budget: float) -> float:
    """Dijkstra over the sets of results that are held; knows no stages and no order."""
    n = len(graph.time_s)
    reads = [sum(1 << s for s, t in graph.edges if t == v) for v in range(n)]
    size = [sum(float(graph.bytes[i]) for i in range(n) if held >> i & 1) for held in range(1 << n)]
    known, heap = {0: 0.0}, [(0.0, 0)]
    while heap:
        cost, held = heapq.heappop(heap)
        if held >> (n - 1) & 1:
            return cost
        if cost > known[held]:
            continue
        steps = [(cost, held & ~(1 << i)) for i in range(n) if held >> i & 1]
        runs = [v for v in range(n) if not held >> v & 1 and reads[v] & held == reads[v] and size[held | 1 << v] <= budget]
        for new, state in steps + [(cost + float(graph.time_s[v]), held | 1 << v) for v in runs]:
            if new < known.get(state, np.inf):
                known[state] = new
                heapq.heappush(heap, (new, state))
    return np.inf


@pytest.mark.parametrize(("n", "budget", "optimum"), [(4, 4, 9), (6, 5, 14), (8, 6, 19)])
def test_integer_program_on_equal_layers(n, budget, optimum):
    """The optimum, its dual bound and a replay agree; the numbers were also found by an independent search."""
    graph = training_graph(np.ones(n), np.ones(n), np.ones(n))
    plan = optimal_graph(graph, budget)
    assert plan is not None
    assert plan.time_s == optimum
    assert plan.bound_s == pytest.approx(optimum)
    assert plan.gap == pytest.approx(0)
    assert replay(graph, plan.computed, plan.carried) == budget
    if n < 8:
        assert cheapest(graph, budget) == optimum


@pytest.mark.parametrize("seed", range(6))
def test_three_ways_on_uneven_chains(seed):
    """Search over all plans = integer program <= persistent plans <= segments, in one model of memory."""
    random = np.random.default_rng(seed)
    n = 5
    forward_s, result, gradient = (random.integers(1, 6, n).astype(float) for _ in range(3))
    graph = training_graph(forward_s, result, gradient)
    none = np.zeros(n)
    x = np.append(0.0, result[:-1])  # the batch is held anyway
    grad_out = np.append(gradient[1:], result[-1])
    layers = Chain(forward_s, none, x, grad_out, none, none == 0, result, result, gradient, none, none == 0, none, none)
    most = peak_bytes(layers, [Span(i, i + 1, recomputed=False) for i in range(n)])
    for budget in np.unique(np.linspace(0.6 * most, most, 4).round()):
        plan = optimal_graph(graph, budget)
        optimum = cheapest(graph, budget)
        assert (plan.time_s if plan else np.inf) == pytest.approx(optimum)
        if plan:
            assert replay(graph, plan.computed, plan.carried) <= budget + 1e-6
        persistent = persistent_added_s(layers, budget, levels=int(budget)) + graph.time_s.sum()
        assert persistent >= optimum - 1e-9
        try:
            assert optimal_segments(layers, budget).added_s + graph.time_s.sum() >= persistent - 1e-9
        except StrategyError:
            assert budget < most
    assert persistent == optimum == graph.time_s.sum()  # with room for everything


def test_graphs_with_a_branch():
    """A residual connection: its input is carried past the branch, or made again."""
    edges = ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (4, 5))
    graph = Graph(np.array([1.0, 2, 2, 2, 1, 1]), np.array([5.0, 1, 1, 1, 5, 1]), edges)
    room = optimal_graph(graph, 100.0)
    tight = optimal_graph(graph, 11.0)
    assert room is not None
    assert tight is not None
    assert room.time_s == 9
    assert tight.time_s == cheapest(graph, 11.0)
    assert optimal_graph(graph, 10.0) is None  # the sum reads five and one and writes five


def test_broken_graphs_and_plans_are_refused():
    with pytest.raises(InputError, match="edge 1 -> 0 must lead to a later node"):
        Graph(np.ones(2), np.ones(2), ((1, 0),))
    graph = Graph(np.ones(2), np.ones(2), ((0, 1),))
    nothing = np.zeros((2, 2), dtype=bool)
    with pytest.raises(InternalError, match="without all that it reads"):
        replay(graph, np.eye(2, dtype=bool), nothing)
    with pytest.raises(InternalError, match="begins with results that nothing made"):
        replay(graph, nothing, np.array([[False, False], [True, False]]))
