"""Steps to a target: the batch law and its fit, loss laws, phases, and how a growing noise scale adds up."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import InputError, QuantityError, UnsupportedError
from simtrain.run.batch_law import efficiency, gain, read_batch_runs
from simtrain.run.loss_laws import CHINCHILLA, CHINCHILLA_REPLICATED, KAPLAN, KAPLAN_NOISE, LOSS_LAWS

PRICE = st.StatePrice(1.0, 8, samples_per_step=100, tokens_per_step=100_000.0)

# Fits of S_min (1 + B_noise/B) to the iterations of public jobs under AdaScale (Sia/Pollux artifact, github.com/siasosp23/artifacts):
# smallest and largest batch, S_min in progress units, B_noise in samples.
PUBLIC_JOBS = {
    "cifar10": (128, 4096, 790, 6_301),
    "imagenet": (200, 12_800, 5_601, 20_644),
    "bert": (12, 384, 18, 10_140),
    "deepspeech2": (20, 640, 532, 1_061),
    "ncf": (256, 32_768, 32, 1.5e6),
    "yolov3": (8, 512, 1_559, 529),
}


@given(least=some.floats(1, 1e6), noise=some.floats(1, 1e6), exponent=some.floats(-3, 3))
def test_steps_and_samples_are_mccandlish_s_hyperbola(least, noise, exponent):
    law = st.BatchLaw(least, noise)
    batch = noise * 10**exponent
    least_samples = least * noise
    assert (law.steps(batch) / least - 1) * (law.samples(batch) / least_samples - 1) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("job", PUBLIC_JOBS)
def test_a_fit_to_noisy_runs_finds_the_law_of_public_jobs(job):
    first, last, least, noise = PUBLIC_JOBS[job]
    batches = np.geomspace(first, last, 7)
    disturbed = least * (1 + noise / batches) * np.array([1.008, 0.993, 1.005, 0.996, 1.007, 0.994, 1.002])
    law = st.fit_batch_law(batches, disturbed)
    assert law.largest_error < 0.016
    inside = np.geomspace(first, last, 5)
    assert [law.steps(b) for b in inside] == pytest.approx([least * (1 + noise / b) for b in inside], rel=0.01)


def test_nine_of_ten_new_runs_end_inside_the_interval():
    rng, batches = np.random.default_rng(3), np.array([32, 64, 128, 256, 512, 1024])
    law, inside = st.BatchLaw(1000, 300), []
    for _ in range(400):
        fitted = st.fit_batch_law(batches, [law.steps(b) * (1 + 0.02 * rng.normal()) for b in batches])
        low, high = fitted.interval(2048)
        inside.append(low < law.steps(2048) * (1 + 0.02 * rng.normal()) < high)
    assert np.mean(inside) == pytest.approx(0.9, abs=0.045)  # three standard errors


def test_a_law_says_where_it_was_not_seen_and_that_a_stated_one_has_no_interval():
    fitted = st.fit_batch_law([32, 64, 128], [10_400, 5_600, 3_150])
    assert fitted.doubt(64) is None
    assert "above the runs, which go from 32 to 128" in fitted.doubt(4096)
    assert "beyond every run" in fitted.doubt(4096)
    assert "below" in fitted.doubt(8)
    assert st.BatchLaw(10, 20).doubt(1e9) is None
    with pytest.raises(InputError, match="stated, not fitted"):
        st.BatchLaw(10, 20).interval(5)
    run = st.simulate_run(dataclasses.replace(PRICE, samples_per_step=4096), until=st.Target(batch_law=fitted))
    assert any("extrapolated" in line for line in run.assumptions)
    assert any("fitted to 3 runs" in line for line in run.assumptions)


def test_runs_are_read_from_a_file_and_what_is_wrong_is_named(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("batch, steps\n32, 10400\n64, 5600\n")
    assert read_batch_runs(str(path)) == ((32, 64), (10_400, 5_600))
    path.write_text("batch,epochs\n32,1\n")
    with pytest.raises(InputError, match="line 2: expected numbers in the columns batch and steps"):
        read_batch_runs(str(path))
    with pytest.raises(InputError, match="No such file"):
        read_batch_runs(str(tmp_path / "none.csv"))


def test_two_batches_do_not_make_a_law():
    with pytest.raises(InputError, match="three different batches"):
        st.fit_batch_law([32, 64, 64], [100, 60, 61])
    with pytest.raises(InputError, match="contradict"):
        st.fit_batch_law([32, 64, 128], [100, 120, 150])


def test_a_noise_scale_of_the_smallest_batch_alone_can_be_worse_than_linear_scaling():
    # cifar10's law, with a noise scale measured four times too small at the smallest batch, as single-batch estimates are.
    law = st.BatchLaw(790, 6_301)
    batches = [256, 512, 1024]
    measured = [law.steps(b) / law.steps(128) for b in batches]
    linear = [128 / b for b in batches]
    alone = [1 / gain(b, 128, 6_301 / 4) for b in batches]
    assert max(abs(a / m - 1) for a, m in zip(alone, measured, strict=True)) > max(
        abs(a / m - 1) for a, m in zip(linear, measured, strict=True)
    )


@given(base=some.floats(1, 1e4), factor=some.floats(1, 1e3), noise=some.floats(1, 1e6))
def test_adascale_s_gain_is_the_law_s_ratio_of_steps(base, factor, noise):
    batch, law = base * factor, st.BatchLaw(100, noise)
    assert gain(batch, base, noise) == pytest.approx(law.steps(base) / law.steps(batch), rel=1e-9)
    # AdaScale's own form, with S = tr(Sigma)/B0 and |G|² = 1, so that B_noise = tr(Sigma)
    s, variance = factor, noise / base
    assert gain(batch, base, noise) == pytest.approx((variance + 1) / (variance / s + 1), rel=1e-9)
    assert efficiency(batch, base, noise) == pytest.approx(gain(batch, base, noise) / s, rel=1e-9)


def test_chinchilla_s_own_model_reaches_its_published_place():
    # 70 billion parameters and 1.4e12 tokens: the constants give 1.9366 (the sum written out by hand)
    assert CHINCHILLA.loss(70e9, np.array([1.4e12]))[0] == pytest.approx(1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28)
    assert CHINCHILLA.loss(70e9, np.array([1.4e12]))[0] == pytest.approx(1.937, abs=0.001)


@pytest.mark.parametrize("law", LOSS_LAWS.values(), ids=LOSS_LAWS)
def test_tokens_invert_the_loss_and_the_floor_is_refused(law):
    for tokens in (1e9, 3e10, 1e12):
        loss = float(law.loss(1e9, np.array([tokens]))[0])
        assert law.tokens(1e9, loss) == pytest.approx(tokens, rel=1e-6)
    floor = law.floor(1e9)
    assert float(law.loss(1e9, np.array([1e40]))[0]) == pytest.approx(floor, rel=1e-3)
    with pytest.raises(InputError, match=f"{floor:.4f}"):
        law.tokens(1e9, floor * 0.999)


def test_a_fit_to_losses_finds_the_law_again():
    n, d = np.meshgrid([1e8, 4e8, 1.6e9, 6.4e9], [2e9, 1e10, 5e10, 2.5e11])
    n, d = n.ravel(), d.ravel()
    rng = np.random.default_rng(0)
    true = np.array([float(CHINCHILLA_REPLICATED.loss(a, np.array(b))) for a, b in zip(n, d, strict=True)])
    fitted = st.fit_chinchilla(n, d, true)
    assert fitted.irreducible == pytest.approx(1.8172, rel=1e-3)
    assert fitted.model_power == pytest.approx(0.3478, rel=1e-3)
    assert fitted.data_power == pytest.approx(0.3658, rel=1e-3)
    noisy = st.fit_chinchilla(n, d, true * rng.normal(1, 0.002, len(n)))
    assert noisy.loss(3e9, np.array([1e11]))[0] == pytest.approx(CHINCHILLA_REPLICATED.loss(3e9, np.array([1e11]))[0], rel=0.005)


def test_a_user_s_curve_is_interpolated_and_never_extrapolated():
    curve = st.LossCurve(((1e6, 8.0), (1e8, 4.0), (1e10, 3.0)))
    assert curve.tokens(1, 4.0) == pytest.approx(1e8)
    assert 3.0 < curve.loss(1, np.array([1e9]))[0] < 4.0
    with pytest.raises(InputError, match="outside of the curve"):
        curve.tokens(1, 2.9)
    with pytest.raises(InputError, match="not extrapolated"):
        curve.loss(1, np.array([1e11]))
    with pytest.raises(InputError, match="falling"):
        st.LossCurve(((1e6, 4.0), (1e8, 4.5)))


def run(loss=3.0, **more):
    return st.simulate_run(PRICE, until=st.Target(loss=loss), parameters=1e9, **more)


def test_far_below_the_noise_scale_tokens_are_the_law_s():
    result = run(noise=None)
    assert result.tokens == pytest.approx(CHINCHILLA.tokens(1e9, 3.0), abs=PRICE.tokens_per_step)
    assert result.loss == pytest.approx(3.0, abs=1e-3)
    assert result.batch_overhead == pytest.approx(1)


@pytest.mark.parametrize("noise", [1e4, 1e5, 1e6])
def test_a_noise_scale_that_stays_gives_s_of_b(noise):
    least = CHINCHILLA.tokens(1e9, 3.0) / noise
    result = run(noise=st.NoiseGrowth(noise))
    assert result.steps == pytest.approx(st.BatchLaw(least, noise).steps(PRICE.tokens_per_step), abs=2)
    assert result.loss == pytest.approx(3.0, abs=1e-3)


def test_a_growing_noise_scale_costs_between_its_smallest_and_its_last():
    result = run(noise=KAPLAN_NOISE)
    last = float(KAPLAN_NOISE.tokens(np.array([3.0]))[0])
    assert result.batch_overhead > 1 + PRICE.tokens_per_step / last
    assert result.loss == pytest.approx(3.0, abs=2e-3)
    small = dataclasses.replace(PRICE, tokens_per_step=1000.0)
    assert st.simulate_run(small, until=st.Target(loss=3.0), parameters=1e9).batch_overhead < 1.03


def test_a_batch_ramp_takes_fewer_tokens_and_more_steps():
    ramp = st.Phase("ramp", tokens=2e8, price=dataclasses.replace(PRICE, tokens_per_step=10_000.0, samples_per_step=10))
    plain, ramped = run(), run(phases=[ramp])
    assert ramped.tokens < plain.tokens
    assert ramped.steps > plain.steps
    assert ramped.loss == pytest.approx(3.0, abs=2e-3)
    assert {batch for _, _, batch, _ in ramped.curve} == {10.0, 100.0}


def test_a_phase_at_the_end_counts_too():
    long = st.Phase("long context", tokens=1e8, price=dataclasses.replace(PRICE, tokens_per_step=200_000.0))
    result = run(phases=[st.Phase("main"), long])
    assert result.loss == pytest.approx(3.0, abs=2e-3)
    with pytest.raises(InputError, match="beyond the target"):
        run(loss=6.0, phases=[st.Phase("main"), st.Phase("too long", tokens=1e12)])


def test_tokens_samples_and_batch_laws_as_targets():
    assert st.simulate_run(PRICE, until=st.Target(tokens=1e7)).steps == 100
    assert st.simulate_run(PRICE, until=st.Target(tokens=1.00001e7)).steps == 101
    assert st.simulate_run(PRICE, until=st.Target(samples=1e4)).steps == 100
    assert st.simulate_run(PRICE, until=st.Target(batch_law=st.BatchLaw(1000, 300))).steps == 4000
    half = st.Phase("small batch", steps=3500, price=dataclasses.replace(PRICE, samples_per_step=50))
    assert st.simulate_run(PRICE, until=st.Target(batch_law=st.BatchLaw(1000, 300)), phases=[half]).steps == 3500 + 2000


def test_a_phase_asks_the_step_floor_for_its_own_sequence_length():
    phases = [st.Phase("main"), st.Phase("long", steps=100, seq_len=512)]
    how = "data=4,micro_batch=1,precision=fp16-amp"
    result = st.simulate_run("gpt2-small", "4x rtx-3090", how, until=st.Target(steps=300), phases=phases)
    short = st.schedule("gpt2-small", "4x rtx-3090", how)
    long = st.schedule(st.workload("gpt2-small", seq_len=512), "4x rtx-3090", how)
    own = st.workload("gpt", layers=2, hidden=64, heads=2, vocabulary=512, seq_len=64)
    with pytest.raises(UnsupportedError, match="cannot be rebuilt"):
        st.simulate_run(own, "4x rtx-3090", how, until=st.Target(steps=300), phases=phases)
    assert result.time_s == pytest.approx(200 * short.step_time_s + 100 * long.step_time_s, rel=1e-9)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="floor for 1e\\+09 parameters"):
        run(loss=1.5)
    with pytest.raises(InputError, match="number of parameters"):
        st.simulate_run(PRICE, until=st.Target(loss=3))
    with pytest.raises(QuantityError, match="loss"):
        st.Target(loss=-1)
    with pytest.raises(InputError, match="only one phase"):
        run(phases=[st.Phase("a"), st.Phase("b")])
    with pytest.raises(InputError, match="kaplan"):
        run(law="kapaln")
    assert KAPLAN.floor(1e9) > 0
