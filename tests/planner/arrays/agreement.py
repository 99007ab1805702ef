"""Random strategies, estimated as arrays and read by `schedule`, which also has the ledger: how far apart they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import simtrain as st
from simtrain.core.runtimes import runtime
from simtrain.planner.arrays.compose import estimate_block
from simtrain.planner.arrays.tables import Tables
from simtrain.planner.space import Wishes, blocks, blocks_of


@dataclass(frozen=True)
class Question:
    """A space from which strategies are drawn."""

    workload: str
    cluster: str
    global_batch: int
    runtimes: tuple[str, ...]
    precisions: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...] = ()
    zeros: tuple[int, ...] | None = None
    piped: bool = False


@dataclass(frozen=True)
class Gap:
    """Arrays over `schedule`, less one, for one strategy."""

    strategy: str
    runtime: str
    even: bool
    time: float
    memory: float
    kinds: float
    within: float


def gaps(question: Question, count: int, seed: int, longest: int, *, replayed: bool = False) -> list[Gap]:
    """Draws strategies that the arrays know, with steps of at most so many instructions, and reads them both ways.

    What the allocator reserves is one factor for both, or the replay for `schedule`, of which arrays take the least that it may be.
    """
    workload, cluster = st.workload(question.workload, **dict(question.sizes)), st.cluster(question.cluster)
    wishes = Wishes(question.precisions, None, question.zeros, "adamw", cluster.size, {})
    counted = [runtime(n) if replayed else runtime(n).with_(replays_blocks=False) for n in question.runtimes]
    space = blocks(workload, cluster, question.global_batch, counted, wishes)[0]
    space = tuple(b for b in space if not question.piped or b.degrees["pipeline"] > 1)
    tables = Tables(workload, cluster)
    chooser = np.random.default_rng(seed)
    few = [space[i] for i in chooser.permutation(len(space))[: max(count // 4, 4)].tolist()]
    estimated = [(block, estimate_block(tables, block)) for block in few]
    known = [(block, found, i) for block, found in estimated for i in np.flatnonzero(found.covered).tolist()]
    result: list[Gap] = []
    for j in chooser.permutation(len(known)).tolist():
        block, found, i = known[j]
        candidate = block.candidate(i)
        strategy = candidate.strategy
        parts = strategy.pipeline * max(strategy.chunks, 1)
        if 2 * strategy.accumulation * parts > longest:
            continue
        exact = st.schedule(workload, cluster, strategy, runtime=candidate.runtime)
        result.append(
            Gap(
                str(strategy),
                candidate.runtime.name,
                blocks_of(workload) % parts == 0,
                float(found.step_time_s[i] / exact.step_time_s - 1),
                float(found.device_bytes[i] / exact.memory.device_bytes - 1),
                float(found.kinds_bytes[i].sum() / exact.memory.allocated_bytes - 1),
                float(found.within[i]),
            )
        )
        if len(result) == count:
            break
    return result


def worst(found: Sequence[Gap]) -> dict[float, float]:
    """The largest difference of step times for each promise of `Estimates.within`."""
    return {within: max(abs(g.time) for g in found if g.within == within) for within in sorted({g.within for g in found})}


def summary(found: Sequence[Gap]) -> str:
    """The worst of them, for people."""
    lines = []
    for within in sorted({g.within for g in found}):
        own = sorted((g for g in found if g.within == within), key=lambda g: -abs(g.time))
        median = np.median([abs(g.time) for g in own])
        lines.append(
            f"within {within:.0%}: {len(own)} strategies, {sum(g.even for g in own)} of them even, time median {median:.3%}, worst:"
        )
        lines += [f"  {g.time:+.2%} {g.runtime} {g.strategy}" for g in own[:3]]
    least, most = min(found, key=lambda g: g.memory), max(found, key=lambda g: g.memory)
    lines.append(f"memory: lowest {least.memory:+.3%} ({least.strategy}), highest {most.memory:+.3%} ({most.strategy})")
    return "\n".join(lines)


QUESTIONS = (
    Question("llama3-8b", "32x h100-sxm", 96, ("megatron", "fsdp2"), ("bf16-master", "bf16-amp")),
    Question("gpt3-175b", "64x a100-sxm-80g", 192, ("megatron", "deepspeed"), ("bf16-master", "fp16-master")),
    Question(
        "gpt",
        "8x rtx-3090",
        32,
        ("megatron", "fsdp2", "torch-eager"),
        ("bf16-amp", "fp16-amp", "fp32"),
        (("layers", 22), ("hidden", 2048), ("heads", 16), ("vocabulary", 50257), ("seq_len", 1024)),
    ),
    Question("llama3-70b", "128x h100-sxm", 256, ("megatron",), ("bf16-master",)),
)
