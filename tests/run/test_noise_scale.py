import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as strategy

from simtrain.core.errors import InputError
from simtrain.run.noise_scale import NoiseAverage, NoiseSample, noise_sample


@given(
    gradient_sqr=strategy.floats(0.01, 100),
    trace=strategy.floats(0.01, 100),
    parts=strategy.integers(2, 64),
    part_size=strategy.integers(1, 512),
)
def test_expected_norms_give_signal_and_noise_exactly(gradient_sqr, trace, parts, part_size):
    part, whole = gradient_sqr + trace / part_size, gradient_sqr + trace / (part_size * parts)
    sample = noise_sample(part, whole, parts, part_size)
    assert sample.gradient_sqr == pytest.approx(gradient_sqr, rel=1e-6, abs=1e-9)
    assert sample.trace == pytest.approx(trace, rel=1e-6, abs=1e-6)
    assert sample.weight == parts - 1


def drawn(rng, mean, deviation, parts, part_size):
    gradients = mean + deviation * rng.standard_normal((parts, len(mean))) / math.sqrt(part_size)
    return noise_sample(float((gradients**2).sum(1).mean()), float((gradients.mean(0) ** 2).sum()), parts, part_size)


@pytest.mark.parametrize(("parts", "part_size"), [(2, 4), (8, 1), (3, 16)])
def test_drawn_gradients_give_both_without_bias(parts, part_size):
    rng, mean, deviation = np.random.default_rng(0), np.linspace(-0.2, 0.3, 20), np.linspace(0.1, 1, 20)
    samples = [drawn(rng, mean, deviation, parts, part_size) for _ in range(4000)]
    for values, truth in (([s.gradient_sqr for s in samples], (mean**2).sum()), ([s.trace for s in samples], (deviation**2).sum())):
        assert abs(np.mean(values) - truth) < 3.5 * np.std(values) / math.sqrt(len(values))


def test_the_ratio_is_of_averages_and_its_standard_error_holds():
    rng, mean, deviation = np.random.default_rng(1), np.full(30, 0.1), np.ones(30)
    truth, inside = 30 / 0.3, 0
    for _ in range(200):
        average = NoiseAverage(decay=1.0)
        for _ in range(100):
            average.add(drawn(rng, mean, deviation, 4, 8))
        noise = average.noise_scale()
        inside += noise.low <= truth <= noise.high
    assert 0.55 < inside / 200 < 0.80  # one standard error holds about 68 %


def test_weights_of_steps_follow_their_degrees_of_freedom_and_start_unbiased():
    average = NoiseAverage(decay=0.5)
    average.add(NoiseSample(10.0, 1.0, 1))
    assert (average.trace, average.gradient_sqr) == (10.0, 1.0)
    average.add(NoiseSample(40.0, 4.0, 3))
    assert average.trace == pytest.approx((0.5 * 10 + 3 * 40) / 3.5)


def test_nothing_is_said_too_early_without_noise_or_without_signal():
    average = NoiseAverage()
    for _ in range(4):
        average.add(NoiseSample(10.0, 1.0, 1))
    assert average.noise_scale() is None
    average.add(NoiseSample(10.0, 1.0, 1))
    assert average.noise_scale().samples == pytest.approx(10)
    silent = NoiseAverage()
    for sign in (1, -1) * 5:
        silent.add(NoiseSample(10.0, sign - 0.01, 1))
    noise = silent.noise_scale()
    assert math.isinf(noise.samples)
    assert math.isinf(noise.high)
    assert math.isfinite(noise.low)
    quiet = NoiseAverage()
    for _ in range(9):
        quiet.add(NoiseSample(-1.0, 1.0, 1))
    assert quiet.noise_scale() is None


def test_overflow_is_left_out_and_state_round_trips():
    average = NoiseAverage()
    for value in (1.0, 2.0, math.inf, math.nan, 3.0, 1.5, 2.5):
        average.add(NoiseSample(10 * value, value, 1))
    assert average.count == 5
    other = NoiseAverage(decay=0.5)
    other.load_state_dict(average.state_dict())
    assert other == average


def test_one_part_or_no_memory_is_refused():
    with pytest.raises(InputError, match="two parts"):
        noise_sample(1.0, 1.0, 1, 8)
    with pytest.raises(InputError, match="one sample or more"):
        noise_sample(1.0, 1.0, 2, 0)
    with pytest.raises(InputError, match="decay"):
        NoiseAverage(decay=0)
