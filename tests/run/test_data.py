import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as strategy

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.run.data import Loader, Storage, cache_hit_rate, feed
from simtrain.run.data_simulation import SharedServer, simulate_loading

LOADER = Loader(32, cpu_s=4e-3, receive_s=1e-3)


def test_without_workers_preparation_and_step_add_up():
    fed = feed(LOADER, 0.03)
    assert fed.period_s == pytest.approx(0.03 + 0.001 + 32 * 4e-3)
    assert fed.bound_by == "main process"
    assert fed.input_bound


def test_workers_divide_preparation_until_the_step_is_longest():
    assert feed(replace(LOADER, workers=2), 0.03).period_s == pytest.approx(0.064)
    fed = feed(replace(LOADER, workers=5), 0.03)
    assert (fed.period_s, fed.bound_by) == (pytest.approx(0.031), "main process")
    assert not feed(replace(LOADER, workers=5, receive_s=0.0), 0.03).input_bound


def test_storage_shared_by_nodes_and_ranks_binds_and_caching_cures_it():
    storage = Storage(1e9, nodes=8)
    loader = replace(LOADER, read_bytes=1e6, workers=16, ranks=4)
    fed = feed(loader, 0.03, storage)
    assert (fed.bound_by, fed.period_s) == ("storage", pytest.approx(32 * 1e6 * 8 * 4 / 1e9))
    assert fed.cures[0].startswith("the data set in a local cache: 31.0 ms")
    assert feed(loader, 0.03, replace(storage, bytes_per_s=math.inf, opens_per_s=1e4)).period_s == pytest.approx(32 * 32 / 1e4)
    assert feed(replace(loader, hit_rate=1.0), 0.03, storage).bound_by == "main process"


def test_cores_pinning_and_copies_bind_where_they_are_slowest():
    assert feed(replace(LOADER, workers=8, cores=2), 0.03).period_s == pytest.approx((0.128 + 0.001 + 0.03) / 2)
    assert feed(replace(LOADER, workers=8, cores=2), 0.03, main_cpu_s=0.0).period_s == pytest.approx(0.129 / 2)
    big = replace(LOADER, workers=8, batch_bytes=1e9)
    assert feed(replace(big, pin_bytes_per_s=5e9), 0.03).bound_by == "pinning"
    blocking = feed(replace(big, copy_bytes_per_s=20e9), 0.03)
    assert blocking.period_s == pytest.approx(0.031 + 0.05)
    assert any("beside the step: 50.0 ms" in cure for cure in blocking.cures)
    assert feed(replace(big, copy_bytes_per_s=20e9, overlapped_copy=True), 0.03).bound_by == "copy"


def test_few_batches_under_way_bind_where_pinning_delays_them():
    loader = replace(LOADER, workers=2, prefetch=1, batch_bytes=1e8, pin_bytes_per_s=2e9)
    fed = feed(loader, 0.03)
    assert (fed.bound_by, fed.period_s) == ("prefetch", pytest.approx((0.128 + 0.05) / 2))
    assert simulate_loading(loader, 0.03).period_s == pytest.approx(fed.period_s)
    assert any(cure.startswith("twice the prefetch: 64.0 ms") for cure in fed.cures)


def test_a_cure_does_what_it_says():
    fed = feed(replace(LOADER, workers=1), 0.05)
    assert fed.cures[0].startswith("3 workers instead of 1: 51.0 ms")
    assert feed(replace(LOADER, workers=3), 0.05).period_s == pytest.approx(0.051)
    assert feed(replace(LOADER, workers=2), 0.05).period_s > 0.051
    assert "cure: 3 workers" in str(fed)
    assert "keeps up" in str(feed(Loader(8, 1e-3, workers=1), 0.05))


@settings(max_examples=40, deadline=None)
@given(
    workers=strategy.integers(0, 8),
    prefetch=strategy.integers(1, 4),
    cpu_s=strategy.floats(1e-4, 1e-2),
    step_s=strategy.floats(0.01, 0.3),
    latency_s=strategy.floats(0, 1e-3),
    overlapped=strategy.booleans(),
)
def test_simulation_and_closed_form_agree_where_nothing_is_random_or_contended(workers, prefetch, cpu_s, step_s, latency_s, overlapped):
    loader = Loader(16, cpu_s, 1e5, 1e7, workers, prefetch, receive_s=1e-3, cores=16, copy_bytes_per_s=1e9, overlapped_copy=overlapped)
    loader = replace(loader, pin_bytes_per_s=4e8)
    storage = Storage(latency_s=latency_s, reader_bytes_per_s=1e9)
    assert simulate_loading(loader, step_s, storage, batches=60).period_s == pytest.approx(feed(loader, step_s, storage).period_s, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    workers=strategy.integers(0, 8),
    cores=strategy.integers(1, 4),
    cpu_s=strategy.floats(1e-3, 1e-2),
    step_s=strategy.floats(0.02, 0.3),
    bytes_per_s=strategy.sampled_from([2e7, 1e8, 1e9]),
)
def test_contention_only_adds_to_the_closed_form_and_not_much(workers, cores, cpu_s, step_s, bytes_per_s):
    loader, storage = Loader(16, cpu_s, 1e5, workers=workers, cores=cores, receive_s=1e-3), Storage(bytes_per_s)
    batches = 1000
    ratio = simulate_loading(loader, step_s, storage, batches=batches).period_s / feed(loader, step_s, storage).period_s
    stock = workers * loader.prefetch  # batches made ahead while the first steps ran: the measured half may live on them
    assert 1 - stock / (batches / 2) - 1e-3 < ratio < 1.2


def test_varying_preparation_costs_time_and_deeper_prefetch_wins_it_back():
    loader = Loader(16, 4e-3, workers=4, prefetch=1, variation=1.0)
    fed = simulate_loading(loader, 0.02, batches=2000)
    assert fed.bound_by == "variation"
    assert fed.period_s > 1.05 * feed(loader, 0.02).period_s
    assert fed.cures[0].startswith("prefetch of 4 instead of 1")
    assert simulate_loading(replace(loader, prefetch=8), 0.02, batches=2000).period_s < fed.period_s
    assert "only the simulation" in feed(loader, 0.02).notes[0]


def test_a_shared_server_shares_equally_up_to_each_ones_limit():
    import simpy

    env = simpy.Environment()
    server, ended = SharedServer(env, 2.0), {}
    for name, amount, limit in (("a", 1.0, 1.0), ("b", 1.0, 1.0), ("c", 2.0, 1.0), ("slow", 0.2, 0.2)):
        server.work(amount, limit).callbacks.append(lambda _, name=name: ended.setdefault(name, env.now))
    env.run()
    # 0.2 for the slow one, 0.6 each for the others until it ends at 1.0; then 2/3 each until a and b end at 1.6, then c alone
    assert ended["slow"] == pytest.approx(1.0)
    assert ended["a"] == ended["b"] == pytest.approx(1.6)
    assert ended["c"] == pytest.approx(1.6 + (2 - 0.6 - 0.4))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_hits_of_an_lru_cache_are_those_of_one_that_is_played(share):
    from collections import OrderedDict

    rng, number = np.random.default_rng(0), 2000
    cache, hits = OrderedDict(), 0
    for epoch in range(6):
        for item in rng.permutation(number).tolist():
            if item in cache:
                cache.move_to_end(item)
                hits += epoch > 0
            else:
                cache[item] = None
                if len(cache) > share * number:
                    cache.popitem(last=False)
    assert hits / (5 * number) == pytest.approx(cache_hit_rate(share), abs=0.015)
    assert cache_hit_rate(share) < cache_hit_rate(share, "none") == share
    assert cache_hit_rate(1.5) == 1


def test_what_no_loader_can_be_is_refused():
    for fields in ({"batch": 0}, {"cpu_s": -1.0}, {"hit_rate": 1.2}, {"prefetch": 0}, {"workers": -1}, {"cpu_s": math.nan}):
        with pytest.raises(InputError):
            Loader(**({"batch": 8, "cpu_s": 1e-3} | fields))
    with pytest.raises(InputError, match="step_s"):
        feed(LOADER, 0.0)
    with pytest.raises(InputError, match="main_cpu_s"):
        feed(LOADER, 0.1, main_cpu_s=0.2)
    with pytest.raises(InputError, match="nodes"):
        Storage(nodes=0)
    with pytest.raises(InputError, match="batches are 20"):
        simulate_loading(LOADER, 0.1, batches=10)
    with pytest.raises(UnknownNameError, match="lru"):
        cache_hit_rate(0.5, "fifo")
    with pytest.raises(InputError, match="cached_share"):
        cache_hit_rate(-0.1)
