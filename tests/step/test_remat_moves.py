"""Keep, recompute or move: the program against exhaustive search, and what it must never do."""

import itertools

import numpy as np
import pytest

from simtrain.core.errors import StrategyError
from simtrain.step.remat_moves import Choice, MovableChain, best_moves, least_moved_bytes, replay
from simtrain.step.remat_optimal import optimal_segments
from tests.step.chains import chain, uniform


def movable(links, seed, *, slowness):
    """A chain whose layers move; the last may not."""
    random = np.random.default_rng(seed + 1000)
    n = len(links)
    saved = links.kept_bytes * random.choice([0.5, 1.0], n)
    may = np.arange(n) < n - 1
    return MovableChain(
        links, links.forward_s, 2 * links.forward_s, may, saved, links.input_bytes, *(slowness * x for x in (saved, saved)),
        *(slowness * x for x in (links.input_bytes, links.input_bytes)),
    )  # fmt: skip


def exhaustive(moves, budget):
    allowed = [np.flatnonzero(row).tolist() for row in moves.allowed()]
    found = [replay(moves, [Choice(c) for c in picked]) for picked in itertools.product(*allowed)]
    return min((added for added, peak in found if peak <= budget * (1 + 1e-9)), default=None), min(peak for _, peak in found)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_choices(seed):
    moves = movable(chain(5, seed, recomputable=seed % 2 == 0), seed, slowness=(0.1, 0.5, 1.5)[seed % 3])
    least = exhaustive(moves, np.inf)[1]
    assert least_moved_bytes(moves) == pytest.approx(least)
    most = replay(moves, [Choice.KEEP] * len(moves))[1]
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = least + share * (most - least)
        plan = best_moves(moves, budget)
        best, _ = exhaustive(moves, budget)
        assert plan.peak_bytes <= budget * (1 + 1e-6)
        assert plan.added_s == pytest.approx(best, rel=1e-3, abs=1e-9)
        assert plan.bound_s <= plan.added_s * (1 + 1e-9)
        assert plan.bound_s == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_copies_far_apart_are_free_and_those_of_neighbours_add_up():
    moves = movable(uniform(8, saved=4.0), 0, slowness=1.0)
    copy = moves.out_s.tolist()
    choices = [Choice.KEEP] * 8
    choices[0] = choices[6] = Choice.MOVE
    alone, _ = replay(moves, choices)
    assert alone == pytest.approx(max(copy[6] - 1, 0) + max(copy[6] - 2, 0))
    added, _ = replay(moves, [Choice.MOVE] * 7 + [Choice.KEEP])
    assert added == pytest.approx(sum(max(c - 1, 0) + max(c - 2, 0) for c in copy[:7]))


def test_a_link_of_any_speed_is_never_worse_than_recomputation_of_single_layers():
    links = uniform(10)
    budget = 25.0
    alone = [best_moves(movable(links, 1, slowness=s), budget).added_s for s in (1e6, 1.0, 0.3, 0.0)]
    assert alone == sorted(alone, reverse=True)
    assert alone[-1] == pytest.approx(0.0, abs=1e-9)
    assert alone[0] >= optimal_segments(links, budget).added_s - 1e-9


def test_a_budget_below_the_smallest_names_it():
    moves = movable(uniform(6), 2, slowness=0.5)
    least = least_moved_bytes(moves)
    with pytest.raises(StrategyError, match="smallest takes"):
        best_moves(moves, 0.9 * least)
    assert best_moves(moves, least * (1 + 1e-9)).peak_bytes <= least * (1 + 1e-6)
