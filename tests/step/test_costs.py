"""Host and device interlock: the four numbers of a pass lose nothing against kernel-by-kernel execution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from simtrain.step.costs import chain, interlock

times = some.floats(0.0, 10.0, allow_nan=False)
kernels = some.lists(some.tuples(times, times), min_size=1, max_size=12)


def run_one_by_one(pairs: list[tuple[float, float]], host: float, device: float) -> tuple[float, float]:
    for device_s, host_s in pairs:
        host += host_s
        device = max(device, host) + device_s
    return host, device


def run_composed(cost, host: float, device: float) -> tuple[float, float]:
    return host + cost.host_s, max(device, host + cost.lead_s) + cost.device_s


def composed(pairs: list[tuple[float, float]]):
    return interlock(np.array([d for d, _ in pairs]), np.array([h for _, h in pairs]), len(pairs))


@given(kernels, times, times)
def test_a_pass_composes_exactly(pairs, host, device):
    assert run_composed(composed(pairs), host, device) == pytest.approx(run_one_by_one(pairs, host, device), abs=1e-9)


@given(kernels, kernels, times, times)
def test_passes_chain_exactly(first, second, host, device):
    whole = chain([composed(first), composed(second)])
    assert run_composed(whole, host, device) == pytest.approx(run_one_by_one(first + second, host, device), abs=1e-9)


def test_a_fast_device_waits_for_its_host():
    cost = interlock(np.full(100, 1e-6), np.full(100, 6e-6), 100)
    _, end = run_composed(cost, 0.0, 0.0)
    assert end == pytest.approx(100 * 6e-6 + 1e-6)


def test_a_slow_device_hides_its_host():
    cost = interlock(np.full(100, 1e-3), np.full(100, 6e-6), 100)
    _, end = run_composed(cost, 0.0, 0.0)
    assert end == pytest.approx(100e-3 + 6e-6)
