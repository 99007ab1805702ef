import numpy as np
import pytest

from simtrain.core.errors import UnknownNameError
from validation.batch_jobs import JobFits, fit_job, fit_jobs, measured_noise


def test_the_law_fits_six_public_jobs_within_a_sixtieth():
    fits = fit_jobs()
    assert {f.job for f in fits} == {"cifar10", "imagenet", "bert", "deepspeech2", "ncf", "yolov3"}
    assert max(f.law.largest_error for f in fits) < 0.0165
    # a run that the fit has not seen, the largest batch (an extrapolation by two) among them
    assert max(abs(e) for f in fits for e in f.errors) < 0.045
    assert float(np.median([abs(e) for f in fits for e in f.errors])) < 0.01
    # linear scaling is off by up to half where the law is not
    assert max(f.linear_error for f in fits) > 0.45


def test_a_measured_noise_scale_grows_and_gives_back_its_own_run():
    least, noise = measured_noise("cifar10")
    grid = np.linspace(0, 1, 20001)
    scales = np.array([noise(p) for p in grid])
    assert noise(0) < 100 < 10_000 < noise(1)
    # integrating 1 + noise / batch over progress counts the steps of the run that it was measured in
    steps = least * np.trapezoid(1 + scales / 128, grid)
    assert steps == pytest.approx(39_062, rel=0.01)
    with pytest.raises(UnknownNameError, match="cifar10"):
        measured_noise("cifar")


def test_own_runs_are_judged_and_asked_about_batches_they_never_saw():
    fit = fit_job("mine", "own runs", [32, 64, 128], [10_400, 5_600, 3_150])
    text = str(JobFits((fit,), "mine.csv", (64, 4096)))
    assert "batch 64: " in text
    assert "careful: a batch of 4096 lies above the runs" in text
    assert "no run is as large as the noise scale" in text
    few = fit_job("mine", "own runs", [32, 64, 128], [10_400, 5_201, 2_601])
    assert few.errors == ()  # two runs do not make a law
