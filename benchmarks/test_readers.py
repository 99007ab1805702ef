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


@pytest.fixture(scope="module")
def pipeline():
    """64 stages and 512 micro-batches under 1F1B: about 65,000 instructions, their hosts and what they send."""
    work = st.workload("gpt", layers=64, hidden=256, heads=4, vocabulary=512, seq_len=128)
    return resolve(work, "64x a100-sxm-80g", "pipeline=64,accumulation=512,precision=bf16")


@pytest.mark.benchmark(group="64 stages, 512 micro-batches")
def test_lowering_a_long_pipeline(benchmark, pipeline):
    assert len(benchmark.pedantic(lower, (pipeline,), rounds=3).program) > 65_536


@pytest.mark.benchmark(group="64 stages, 512 micro-batches")
def test_longest_path_of_a_long_pipeline(benchmark, pipeline):
    program = lower(pipeline).program
    assert benchmark.pedantic(steady_state, (program, program.durations_s()), rounds=3).period_s > 0


@pytest.mark.benchmark(group="64 stages, 512 micro-batches")
@pytest.mark.parametrize("links", ["shared", "as if nothing met"])
def test_simulation_of_a_long_pipeline(benchmark, pipeline, links, monkeypatch):
    """The price of contention is the difference between the two."""
    program = lower(pipeline).program
    if links != "shared":
        monkeypatch.setattr("simtrain.step.simulate.shared_terms", lambda p: np.zeros(len(p), dtype=bool))
    start_s, _ = benchmark.pedantic(run_program, (program, np.ones((1, len(program)))), rounds=3)
    assert np.isfinite(start_s).all()


@pytest.mark.benchmark(group="64 stages, 512 micro-batches")
def test_a_bare_loop_of_one_timeout_and_one_callback(benchmark, pipeline):
    import simpy

    count = len(lower(pipeline).program)

    def bare() -> float:
        env, left = simpy.Environment(), [count]

        def again(_: simpy.Event) -> None:
            left[0] -= 1
            if left[0]:
                env.timeout(1.0).callbacks.append(again)

        env.timeout(1.0).callbacks.append(again)
        env.run()
        return float(env.now)

    assert benchmark.pedantic(bare, rounds=3) == count


@pytest.mark.benchmark(group="Llama 3 405B on 16,384 H100")
@pytest.mark.parametrize("reader", [st.estimate, st.schedule, st.simulate], ids=lambda r: r.__name__)
def test_prediction_of_a_large_job(benchmark, reader):
    work, cluster = st.workload("llama3.1-405b"), st.cluster("16384x h100-sxm")
    strategy = "tensor=8,sequence_parallel=true,pipeline=16,data=128,accumulation=16,precision=bf16-master,zero=1"
    assert benchmark.pedantic(reader, (work, cluster, strategy), {"runtime": "megatron"}, rounds=2).step_time_s > 0
