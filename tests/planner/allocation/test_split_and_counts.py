"""The exact parts of the search against brute force, and bounds that hold."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from simtrain.core.errors import InputError, InternalError
from simtrain.planner.allocation.bound import check_bound, layer_bound_s, replica_bound_s
from simtrain.planner.allocation.counts import shares
from simtrain.planner.allocation.events import replica_s
from simtrain.planner.allocation.families import family
from simtrain.planner.allocation.prices import Share, Unit
from simtrain.planner.allocation.search import evaluate, search
from simtrain.planner.allocation.split import splits, stage_costs
from tests.planner.allocation.markets import market, prices


@given(some.lists(some.floats(0.1, 5), min_size=4, max_size=8), some.floats(1, 4), some.floats(0, 1), some.floats(4, 40))
@settings(max_examples=40, deadline=None)
def test_the_cut_is_the_best_of_all_cuts(passes, slower, send, spare):
    table = {("fast", 1, 1): prices(passes, spare=spare), ("slow", 1, 1): prices(np.array(passes) * slower, spare=spare)}
    asked = market(table, {"fast": 4, "slow": 4}, 8, send_s=send)
    units = [Unit("slow", 1), Unit("slow", 1), Unit("fast", 1)]
    n = len(passes)

    def slowest(cuts):
        bounds = list(zip((0, *cuts), (*cuts, n), strict=True))
        return max(stage_costs(asked, units, s, 1)[start, end - 1] for s, (start, end) in enumerate(bounds))

    best = min(slowest(cuts) for cuts in combinations(range(1, n), 2))
    (found,) = splits(asked, units, 1, np.array([np.inf]))
    if not np.isfinite(best):
        assert found is None
    else:
        assert slowest([s.end for s in found.stages[:-1]]) == pytest.approx(best)
        assert [s.start for s in found.stages] == [0, *(s.end for s in found.stages[:-1])]


def test_earlier_stages_hold_more_micro_batches():
    table = {("a", 1, 1): prices(np.ones(6), fixed=0.0, kept=1.0, spare=6.5)}
    asked = market(table, {"a": 3}, 3)
    (found,) = splits(asked, [Unit("a", 1)] * 3, 1, np.array([np.inf]))
    layers = [s.end - s.start for s in found.stages]
    assert all(n * (3 - i) <= 6.5 for i, n in enumerate(layers))


@given(some.floats(0.5, 3), some.floats(0.5, 3), some.integers(1, 3), some.integers(1, 3), some.integers(4, 14))
@settings(max_examples=12, deadline=None)
def test_shares_of_single_devices_are_the_best_of_all(fast, slow, n_fast, n_slow, batch):
    table = {("a", 1, 1): prices([fast]), ("b", 1, 1): prices([slow])}
    asked = market(table, {"a": n_fast, "b": n_slow}, batch)
    found = search(asked).proposals[0]
    speeds = [fast] * n_fast + [slow] * n_slow
    best = min(
        max(s * m for s, m in zip(speeds, counts, strict=True))
        for counts in product(range(batch + 1), repeat=len(speeds))
        if sum(counts) == batch
    )
    assert found.step_time_s == pytest.approx(best, rel=2e-3)
    assert sum(s.samples for s in found.shares) == batch


@given(some.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_no_plan_beats_the_bound_and_devices_suffice(seed):
    random = np.random.default_rng(seed)
    passes = random.uniform(0.5, 2, 6)
    table = {
        (kind, width, size): prices(passes * speed * size**0.9 / width**0.9, gradient=1 / width, spare=random.uniform(10, 40))
        for kind, speed in (("a", 1.0), ("b", random.uniform(1, 4)))
        for width in (1, 2)
        for size in (1, 2)
    }
    counts = {"a": int(random.integers(1, 5)), "b": int(random.integers(1, 9))}
    asked = market(table, counts, 24, send_s=0.05, synchronise_s=0.01)
    found = search(asked)
    for proposal in found.proposals:
        assert found.bound_s <= proposal.step_time_s
        assert sum(s.samples for s in proposal.shares) == 24
        for kind, n in counts.items():
            assert sum(s.copies * s.template.devices(kind) for s in proposal.shares) <= n
    best = found.proposals[0]
    assert max(replica_s(asked, s.template, s.micro_batches) for s in best.shares) == pytest.approx(best.passes_s)
    assert layer_bound_s(asked) <= replica_bound_s(asked) + 1e-12


def test_the_bound_of_layers_lies_below_that_of_replicas_where_types_suit_different_layers():
    table = {("a", 1, 1): prices([1.0, 4.0]), ("b", 1, 1): prices([4.0, 1.0])}
    asked = market(table, {"a": 1, "b": 1}, 10)
    assert replica_bound_s(asked) == pytest.approx(25.0)
    assert layer_bound_s(asked) == pytest.approx(10.0)
    assert search(asked).proposals[0].step_time_s == pytest.approx(11.0)  # one pipeline of both, one slot to fill


def test_slow_devices_are_left_out_when_synchronising_with_them_costs_more():
    table = {("fast", 1, 1): prices(np.ones(2)), ("slow", 1, 1): prices(np.ones(2) * 20)}
    asked = market(table, {"fast": 1, "slow": 1}, 16, send_s=50.0, synchronise_s=10.0)
    (alone,) = search(asked).proposals[0].shares
    assert alone.template.kinds == ("fast",)


def test_a_bound_above_the_plan_is_an_internal_error():
    check_bound(1.0, 1.0)
    with pytest.raises(InternalError, match="lies above the plan's own"):
        check_bound(1.01, 1.0)


def test_a_layer_that_fits_nowhere_is_named():
    needs = prices(np.ones(4), spare=10.0)
    needs.fixed_bytes[2] = 3 * 2**30
    with pytest.raises(InputError, match=r"layer 2 fits on no device \(a\): at the smallest micro-batch it needs 3.00 GiB"):
        search(market({("a", 1, 1): needs}, {"a": 2}, 4))


def test_a_batch_that_micro_batches_do_not_make_up_is_refused():
    with pytest.raises(InputError, match="use a multiple of 4"):
        search(market({("a", 1, 4): prices(np.ones(2))}, {"a": 1}, 6))
    with pytest.raises(InputError, match="no device"):
        market({("a", 1, 1): prices(np.ones(2))}, {"a": 0}, 6)


def test_equal_replicas_get_equal_shares():
    asked = market({("a", 1, 2): prices(np.ones(3))}, {"a": 4}, 32)
    members = family(asked)
    alone = next(i for i, t in enumerate(members.templates) if len(t.stages) == 1)
    assert shares(asked, members, [(alone, 4)]) == (Share(members.templates[alone], 4, 4),)
    assert evaluate(asked, shares(asked, members, [(alone, 4)])).step_time_s == pytest.approx(12.0)
