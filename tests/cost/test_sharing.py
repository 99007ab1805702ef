"""Max-min fair sharing: feasible, nothing wasted, and nobody can have more without someone poorer having less."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.sparse import csr_array

from simtrain.core.errors import InputError
from simtrain.cost.sharing import max_min_rates

NUMBERS = some.floats(1e-3, 1e6)


@some.composite
def problems(draw):
    flows, resources = draw(some.integers(1, 7)), draw(some.integers(1, 6))
    demand = np.array([[draw(some.one_of(some.just(0.0), NUMBERS)) for _ in range(resources)] for _ in range(flows)])
    capacities = np.array([draw(NUMBERS) for _ in range(resources)])
    caps = np.array([draw(some.one_of(some.just(np.inf), NUMBERS)) for _ in range(flows)])
    demand[:, 0] = np.maximum(demand[:, 0], np.where(demand.max(axis=1) > 0, 0.0, 1.0))  # every flow needs something
    return demand, capacities, caps


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_rates_are_feasible_and_every_flow_has_its_bottleneck(problem):
    demand, capacities, caps = problem
    rates = max_min_rates(csr_array(demand), capacities, caps)
    load = rates @ demand
    assert np.all(load <= capacities * (1 + 1e-9))
    assert np.all(rates <= caps * (1 + 1e-9))
    level = rates * demand.max(axis=1)
    full = load >= capacities * (1 - 1e-9)
    for i in range(len(rates)):
        # Max-min fair (and so Pareto): at its cap, or on a full resource where nobody is faster (Bertsekas and Gallager 1992).
        bottleneck = [r for r in np.flatnonzero(full & (demand[i] > 0)) if np.all(level[demand[:, r] > 0] <= level[i] * (1 + 1e-6))]
        assert rates[i] >= caps[i] * (1 - 1e-9) or bottleneck


@settings(max_examples=50, deadline=None)
@given(problem=problems())
def test_alone_a_flow_has_its_frozen_rate(problem):
    demand, capacities, caps = problem
    frozen = min(caps[0], 1 / np.max(demand[0] / capacities))
    assert max_min_rates(csr_array(demand[:1]), capacities, caps[:1])[0] == pytest.approx(frozen)


def test_the_textbook_line():
    # One long flow over two links, one short on each; the second link is twice as fast.
    demand = csr_array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert max_min_rates(demand, np.array([1.0, 2.0]), np.full(3, np.inf)).tolist() == pytest.approx([0.5, 0.5, 1.5])


def test_messages_of_different_size_share_a_link_equally():
    rates = max_min_rates(csr_array([[1e9], [1e3]]), np.array([1e9]), np.full(2, np.inf))
    assert (rates * [1e9, 1e3]).tolist() == pytest.approx([5e8, 5e8])


def test_a_flow_that_needs_nothing_runs_at_its_own_rate():
    assert max_min_rates(csr_array([[0.0], [1.0]]), np.array([2.0]), np.array([7.0, 9.0])).tolist() == [7.0, 2.0]


@pytest.mark.parametrize(
    ("demand", "capacity", "cap", "text"),
    [([[1.0]], [0.0], [1.0], "bandwidth"), ([[-1.0]], [1.0], [1.0], "negative"), ([[1.0]], [1.0, 1.0], [1.0], "capacities")],
)
def test_nonsense_is_refused(demand, capacity, cap, text):
    with pytest.raises(InputError, match=text):
        max_min_rates(csr_array(demand), np.array(capacity), np.array(cap))
