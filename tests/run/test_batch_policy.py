import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as strategy

from simtrain.core.errors import InputError
from simtrain.run.batch_policy import BatchChoice, BatchPolicy, MeasuredPrice, StepPrice, relative_time
from simtrain.run.noise_scale import NoiseScale

PRICE = StepPrice(update_s=0.3, pass_s=0.01, sample_s=0.005)


@given(noise=strategy.floats(10, 5000), update_s=strategy.floats(0.01, 5))
def test_accumulation_is_next_to_the_square_root_that_calculus_gives(noise, update_s):
    price, policy = StepPrice(update_s, 0.01, 0.005), BatchPolicy((8,), max_accumulation=2000)
    exact = math.sqrt(update_s * noise / (8 * 0.05))  # of (u + k m) (1 + noise / (b k))
    assert abs(policy.best(noise, price).accumulation - max(exact, 1)) <= 1


def test_without_a_price_per_step_the_smallest_batch_is_best_and_more_noise_never_shrinks_it():
    policy = BatchPolicy((4, 8), max_accumulation=32)
    assert policy.best(1000, StepPrice(0, 0, 0.01)).batch == 4
    batches = [policy.best(noise, PRICE).batch for noise in (1, 10, 100, 1000, 1e4, math.inf)]
    assert batches == sorted(batches)
    assert batches[-1] == 256


def test_micro_batches_stay_within_memory_and_batches_below_their_limit():
    policy = BatchPolicy((4, 8, 16), memory_bytes=lambda b: b * 2**30, memory_limit_bytes=10 * 2**30, max_batch=64)
    assert {c.micro_batch for c in policy.choices()} == {4, 8}
    assert max(c.batch for c in policy.choices(replicas=2)) == 64
    assert policy.best(1e6, PRICE).micro_batch == 8  # dearer per pass than per sample
    with pytest.raises(InputError, match="no micro-batch fits: 4 samples need 4"):
        replace(policy, memory_limit_bytes=2**30)
    with pytest.raises(InputError, match="exceed max_batch = 64"):
        policy.choices(replicas=32)


def test_a_change_must_pay_beyond_margin_and_doubt():
    policy, now = BatchPolicy((8,), dwell_steps=50, margin=0.03), BatchChoice(8, 4)
    sure = NoiseScale.exact(400.0)
    assert policy.next(now, sure, PRICE, 50).batch == 64  # max_growth of two
    assert policy.next(now, sure, PRICE, 49) == now
    assert policy.next(now, None, PRICE, 1000) == now
    assert policy.next(now, NoiseScale(400, 20, math.inf), PRICE, 1000) == now
    near = policy.best(400.0, PRICE)
    assert policy.next(BatchChoice(8, near.accumulation - 1), sure, PRICE, 1000).accumulation == near.accumulation - 1
    assert policy.next(now, NoiseScale(math.inf, 300, math.inf), PRICE, 1000).batch > 32


def test_measured_prices_never_speak_of_what_never_ran():
    price = MeasuredPrice(memory=0.5)
    policy = BatchPolicy((8, 16))
    with pytest.raises(InputError, match="no batch has a price"):
        policy.best(100, price)
    price.add(8, 0.1, 0.02)
    price.add(8, 0.2, 0.04)
    assert price(8, 2) == pytest.approx(0.33)
    assert math.isinf(price(16, 1))
    assert policy.best(1e5, price).micro_batch == 8
    other = MeasuredPrice()
    other.load_state_dict(price.state_dict())
    assert other(8, 3) == price(8, 3)


def test_relative_time_is_the_law():
    assert relative_time(2.0, 10, 30.0) / relative_time(2.0, 30, 30.0) == pytest.approx(4 / 2)
    assert relative_time(2.0, 10, math.inf) == 0.2


def test_what_cannot_be_chosen_is_refused():
    for fields in ({"micro_batches": ()}, {"micro_batches": (0,)}, {"margin": 1}, {"max_growth": 1}, {"dwell_steps": 0}):
        with pytest.raises(InputError):
            BatchPolicy(**({"micro_batches": (8,)} | fields))
    with pytest.raises(InputError, match="accumulation is 1 or more"):
        BatchChoice(8, 0)
