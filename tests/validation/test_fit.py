import numpy as np
import pytest

from validation.fit import ClassCost, fit_class, fit_classes, framework_launch_s

PRIOR = ClassCost(launch_s=5e-6, flops_per_s=90e9, bytes_per_s=20e9)


def synthetic(cost: ClassCost, seed: int = 0, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = np.column_stack([rng.integers(50, 500, 10), rng.uniform(1e9, 3e10, 10), rng.uniform(1e8, 4e9, 10)]).astype(float)
    times = np.array([cost.seconds(*row) for row in features])
    return features, times * (1 + noise * rng.standard_normal(10))


def test_the_fit_recovers_known_coefficients():
    known = ClassCost(launch_s=7e-6, flops_per_s=110e9, bytes_per_s=12e9)
    fit = fit_class(*synthetic(known), PRIOR)
    assert fit.cost.flops_per_s == pytest.approx(known.flops_per_s, rel=0.02)
    assert fit.cost.bytes_per_s == pytest.approx(known.bytes_per_s, rel=0.03)
    assert fit.residual < 0.005


def test_noise_of_two_percent_moves_predictions_by_less_than_that():
    known = ClassCost(launch_s=7e-6, flops_per_s=110e9, bytes_per_s=12e9)
    fit = fit_class(*synthetic(known, noise=0.02), PRIOR)
    features, times = synthetic(known, seed=1)
    predicted = np.array([fit.cost.seconds(*row) for row in features])
    assert np.abs(predicted / times - 1).max() < 0.02


def test_what_measurements_cannot_tell_stays_at_the_prior():
    features, _ = synthetic(PRIOR)
    features[:, 1] = 0
    times = features @ np.array([6e-6, 0, 1 / 15e9])
    fit = fit_class(features, times, PRIOR)
    assert fit.cost.flops_per_s == pytest.approx(PRIOR.flops_per_s)
    assert fit.cost.bytes_per_s == pytest.approx(15e9, rel=0.05)


def test_costs_are_never_negative():
    features, times = synthetic(PRIOR)
    fit = fit_class(features, np.maximum(times - 0.05 * features[:, 2] / features[:, 2].max(), 1e-3), PRIOR)
    assert fit.cost.launch_s >= 0
    assert fit.cost.flops_per_s > 0
    assert fit.cost.bytes_per_s > 0
    assert np.isfinite([fit.cost.flops_per_s, fit.cost.bytes_per_s]).all()


def test_classes_are_fitted_apart_and_missing_ones_are_left_out():
    features, times = synthetic(PRIOR)
    rows = [{"gemm": f, "norm": f} for f in features]
    fits = fit_classes(rows, [{"gemm": t} for t in times], {"gemm": PRIOR, "norm": PRIOR, "softmax": PRIOR})
    assert set(fits) == {"gemm"}


def test_the_framework_remainder_is_a_cost_per_launch_and_not_negative():
    assert framework_launch_s([1e-3, 2e-3], [100, 200]) == pytest.approx(1e-5)
    assert framework_launch_s([-1e-3, -2e-3], [100, 200]) == 0
