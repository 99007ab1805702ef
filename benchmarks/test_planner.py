"""Speed of the planner's stages side by side: compare the ratios of the medians (candidates per second is the inverse of each)."""

import pytest

import simtrain as st
from simtrain.core.hardware import Cluster
from simtrain.core.workload import Workload
from simtrain.planner.screen import Screen
from simtrain.planner.space import Candidate, Wishes, candidates, default_runtimes

EVERY = 200
"""Of the candidates, every so many are looked at."""


@pytest.fixture(scope="module")
def question() -> tuple[Workload, Cluster, tuple[Candidate, ...]]:
    workload, cluster = st.workload("llama3-8b"), st.cluster("64x h100-sxm")
    wishes = Wishes(None, None, None, "adamw", cluster.size, {})
    return workload, cluster, candidates(workload, cluster, 512, default_runtimes(cluster, workload), wishes)[0][::EVERY]


@pytest.mark.benchmark(group="the same candidates, Llama 3 8B on 64 H100")
@pytest.mark.parametrize("stage", ["bound", "memory", "estimate", "schedule"])
def test_stage(benchmark, question, stage):
    workload, cluster, chosen = question

    def look() -> None:
        screen = Screen(workload, cluster)
        for c in chosen:
            if stage == "bound":
                screen.bound_s(c)
            elif stage == "memory":
                screen.memory(c)
            else:
                (st.estimate if stage == "estimate" else st.schedule)(workload, cluster, c.strategy, runtime=c.runtime)

    benchmark.extra_info["candidates"] = len(chosen)
    benchmark.pedantic(look, rounds=1 if stage == "schedule" else 2)


@pytest.mark.benchmark(group="a whole plan")
@pytest.mark.parametrize("cluster", ["8x h100-sxm", "64x h100-sxm"])
def test_plan(benchmark, cluster):
    found = benchmark.pedantic(st.plan, ("llama3-8b", cluster, 512), {"runtime": "megatron"}, rounds=1)
    assert found.complete
