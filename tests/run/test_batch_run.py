import math

import numpy as np
import pytest

from simtrain.core.errors import InputError
from simtrain.run.batch_policy import BatchChoice, BatchPolicy, StepPrice
from simtrain.run.batch_run import Training, best_fixed, play, play_fixed
from simtrain.run.learning_rate import LearningRate

PRICE = StepPrice(update_s=0.3, pass_s=0.02, sample_s=0.005)
GROWING = Training(5000, lambda progress: 50 * 100**progress, PRICE)


def test_a_fixed_batch_follows_the_law():
    run = play_fixed(Training(700, lambda _: 320.0, PRICE), BatchChoice(8, 4))
    assert run.steps == pytest.approx(700 * (1 + 320 / 32))
    assert run.samples == pytest.approx(run.steps * 32)
    assert run.time_to_target_s == pytest.approx(run.steps * PRICE(8, 4))


def test_a_growing_noise_scale_counts_by_its_mean_over_progress():
    run = play_fixed(GROWING, BatchChoice(8, 16))
    mean = 50 * 99 / math.log(100)
    assert run.steps == pytest.approx(5000 * (1 + mean / 128), rel=1e-5)


def test_the_policy_beats_the_best_fixed_batch_that_hindsight_finds():
    policy = BatchPolicy((8,), 64, dwell_steps=20)
    run, (choice, fixed) = play(policy, GROWING, BatchChoice(8, 4)), best_fixed(policy, GROWING)
    assert run.time_to_target_s < fixed.time_to_target_s
    assert play_fixed(GROWING, BatchChoice(8, choice.accumulation + 1)).time_to_target_s > fixed.time_to_target_s
    assert run.batch[0] < choice.batch < run.batch[-1]
    assert np.all(np.diff(run.batch) >= 0)
    # no policy can beat the integral of the least relative time, which follows from (sqrt(u) + sqrt(m noise / b))^2
    grid = (np.arange(2000) + 0.5) / 2000
    bound = 5000 * np.mean((math.sqrt(0.3) + np.sqrt(0.06 * 50 * 100**grid / 8)) ** 2)
    assert bound < run.time_to_target_s < 1.03 * bound


def test_a_noisy_measurement_costs_little_and_hysteresis_keeps_changes_few():
    policy = BatchPolicy((8,), 64, dwell_steps=50)
    exact = play(policy, GROWING, BatchChoice(8, 4))
    noisy = play(policy, GROWING, BatchChoice(8, 4), relative_error=0.3, seed=1)
    assert noisy.time_to_target_s < 1.03 * exact.time_to_target_s
    assert np.count_nonzero(np.diff(noisy.batch)) < 3 * np.count_nonzero(np.diff(exact.batch)) + 10


def test_learning_rate_rises_with_the_batch_and_falls_with_the_cosine():
    policy, rate = BatchPolicy((8,), 64, dwell_steps=20), LearningRate(32, total_steps=50_000, warmup_steps=200)
    run = play(policy, GROWING, BatchChoice(8, 4), learning_rate=rate)
    assert run.learning_rate[0] == pytest.approx(1 / 200)
    assert run.learning_rate.max() > 1
    assert run.learning_rate[-1] < run.learning_rate.max()


def test_what_no_training_can_be_is_refused():
    policy = BatchPolicy((8,))
    with pytest.raises(InputError, match="noise scale at progress 0 is -1"):
        play(policy, Training(10, lambda _: -1.0, PRICE), BatchChoice(8))
    with pytest.raises(InputError, match="priced at 0"):
        play_fixed(Training(10, lambda _: 1.0, lambda _b, _k: 0.0), BatchChoice(8))
    with pytest.raises(InputError, match="noise_free_steps"):
        Training(0, lambda _: 1.0, PRICE)
    with pytest.raises(InputError, match="relative_error"):
        play(policy, GROWING, BatchChoice(8), relative_error=-1)


def test_a_kept_learning_rate_gains_less_than_twice_however_large_the_batch():
    kept = Training(700, lambda _: 3200.0, PRICE, kept_rate_batch=32)
    follows = Training(700, lambda _: 3200.0, PRICE)
    base = follows.pace(3200, 32)
    assert kept.pace(3200, 32) == pytest.approx(base)
    assert base < kept.pace(3200, 64) < follows.pace(3200, 64) < 2 * base
    assert kept.pace(3200, 1e9) == pytest.approx(base * (2 - 1 / 101), rel=1e-6)
    # in the quadratic model a rate of c times the noise-free one gains 2c - c²/u: the best c is u, the kept one u0
    grid = np.linspace(1e-4, 1, 100_001)
    own = follows.pace(3200, 320)
    assert (2 * grid - grid**2 / own).max() == pytest.approx(own, rel=1e-6)
    assert 2 * base - base**2 / own == pytest.approx(kept.pace(3200, 320))
    with pytest.raises(InputError, match="get nowhere"):
        kept.pace(3200, 15)
