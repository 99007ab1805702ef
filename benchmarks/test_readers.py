"""Speed of the readers side by side: run with `make benchmark`, compare the ratios of the medians, never single times."""

import numpy as np
import pytest

import simtrain as st
from simtrain.core.hardware import Cluster
from simtrain.step.longest_path import steady_state
from simtrain.step.lower import lower
from simtrain.step.setting import resolve
from simtrain.step.simulate import run_program

STRATEGY = "data=4,micro_batch=4,accumulation=16,precision=bf16-amp"


@pytest.fixture(scope="module")
def box() -> Cluster:
    return st.cluster("4x rtx-3090")


@pytest.mark.benchmark(group="a prediction of GPT-2 small, 16 micro-batches")
@pytest.mark.parametrize("reader", [st.estimate, st.schedule, st.simulate], ids=lambda r: r.__name__)
def test_prediction(benchmark, box, reader):
    workload = st.workload("gpt2-small")
    result = benchmark(reader, workload, box, STRATEGY)
    assert result.step_time_s > 0


@pytest.fixture(scope="module")
def large():
    """About 65,000 terms: the most micro-batches of GPT-2 small that fit that count."""
    return lower(resolve("gpt2-small", "4x rtx-3090", "data=4,micro_batch=1,accumulation=1170,precision=bf16-amp")).program


@pytest.mark.benchmark(group="one step of 65,000 terms")
def test_longest_path_of_a_large_program(benchmark, large):
    durations = large.durations_s()
    assert benchmark.pedantic(steady_state, (large, durations), rounds=3).period_s > 0


@pytest.mark.benchmark(group="one step of 65,000 terms")
def test_simulation_of_a_large_program(benchmark, large):
    factors = np.ones((2, len(large)))
    _, ends = benchmark.pedantic(run_program, (large, factors), rounds=3)
    assert np.isfinite(ends).all()
