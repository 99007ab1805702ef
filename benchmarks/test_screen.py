"""Screening as arrays: evaluations per second with and without building tables, memory, and the time to a confirmed best."""

import resource
import time

import numpy as np
import pytest

import simtrain as st
from simtrain.core.runtimes import runtime
from simtrain.planner.arrays.compose import estimate_block
from simtrain.planner.arrays.tables import Tables
from simtrain.planner.space import Block, Wishes, blocks, merged
from tests.planner.arrays.agreement import QUESTIONS, Gap, gaps, summary, worst

BATCHES = (512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144)
PLANS = (
    ("gpt3-175b", "64x a100-sxm-80g", 256),
    ("gpt3-175b", "512x a100-sxm-80g", 1536),
    ("megatron-1t", "4096x a100-sxm-80g", 2048),
    ("llama3-405b", "16384x h100-sxm", 2048),
    ("resnet-50", "8x rtx-3090", 1024),
)


def widened(block: Block, wide: st.Workload) -> Block:
    """A block with more to choose from than is customary: every interleaving, ZeRO stages 0 to 2, the sequence divided or not."""
    stages, layers = block.degrees["pipeline"], sum(x.repeats for x in wide.layers if x.block)
    chunks = [n for n in range(2, 13) if stages * n <= layers] if stages > 1 else []
    axes = (
        block.micro_batches,
        ("bf16-master", "fp16-master"),
        ("none", "full") if block.runtime.kernels.fused_attention else ("none", "selective", "full"),
        (0, 1, 2) if block.degrees["data"] > 1 else (0,),
        (False, True) if block.degrees["tensor"] > 1 else (False,),
        (("1f1b", 0), *(("interleaved", n) for n in chunks)),
    )
    codes = np.indices([len(a) for a in axes]).reshape(len(axes), -1).T
    return Block(block.runtime, block.degrees, *axes, block.rest, codes)


def test_hundreds_of_thousands_of_candidates_of_gpt3_on_512_gpus(benchmark):
    workload, cluster = st.workload("gpt3-175b"), st.cluster("512x a100-sxm-80g")
    names = ("megatron",)
    wishes = Wishes(None, None, None, "adamw", cluster.size, {})
    narrow = [b for batch in BATCHES for b in blocks(workload, cluster, batch, [runtime(n) for n in names], wishes)[0]]
    space = merged([widened(b, workload) for b in narrow])
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tables = Tables(workload, cluster)
    known = sum(int(estimate_block(tables, block).covered.sum()) for block in space)
    cold_s = time.perf_counter() - start

    def again() -> int:
        return sum(int(estimate_block(tables, block).covered.sum()) for block in space)

    benchmark.pedantic(again, rounds=1)
    benchmark.extra_info |= {
        "combinations": sum(map(len, space)),
        "evaluated": known,
        "per_s_with_tables": round(known / cold_s),
        "per_s": round(known / benchmark.stats["mean"]),
        "more_memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }
    print(benchmark.extra_info)
    assert known > 300_000


def test_a_thousand_random_strategies(benchmark):
    def read() -> list[Gap]:
        return [gap for seed, question in enumerate(QUESTIONS) for gap in gaps(question, 250, 100 + seed, longest=3000)]

    found = benchmark.pedantic(read, rounds=1)
    print(summary(found))
    assert len(found) == 1000
    assert all(gap <= within for within, gap in worst(found).items())
    assert min(g.memory for g in found) > -0.01


@pytest.mark.benchmark(group="time to the confirmed best")
@pytest.mark.parametrize(("workload", "cluster", "batch"), PLANS)
def test_time_to_the_confirmed_best(benchmark, workload, cluster, batch):
    found = benchmark.pedantic(st.plan, (workload, cluster, batch), rounds=1)
    assert found.complete
    assert found.best is not None
    benchmark.extra_info |= {"considered": found.considered, "best": found.best.strategy, "reader": found.best.reader}
    print(workload, cluster, benchmark.extra_info, benchmark.stats["mean"])
