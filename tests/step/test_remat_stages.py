"""Recomputation in pipelines: explicit blocks reach the stages that hold them, and each stage recomputes what its own memory asks for."""

import pytest

import simtrain as st
from simtrain.core.checkpoint import blocks_within
from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.step.layout import lay_out
from simtrain.step.ledger import ledger
from simtrain.step.setting import resolve

CLUSTER = "4x a100-sxm-40g"
STRATEGY = st.Strategy(pipeline=4, micro_batch=2, accumulation=8, precision="bf16-amp")


@pytest.fixture(scope="module")
def gpt() -> st.Workload:
    return st.workload("gpt2-small", layers=16, seq_len=512, vocabulary=1024)


def stage_bytes(work: st.Workload, strategy: st.Strategy) -> list[float]:
    layout = lay_out(resolve(work, CLUSTER, strategy))
    return [ledger(layout.setting, lane, layout.plan).peak_bytes for lane in layout.lanes]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
def test_all_blocks_by_name_are_full(gpt: st.Workload, schedule: str) -> None:
    full, named = (st.schedule(gpt, CLUSTER, STRATEGY.with_(schedule=schedule, checkpoint=c)) for c in ("full", "layers:0-15"))
    assert named.step_time_s == pytest.approx(full.step_time_s, rel=1e-12)
    assert named.memory.allocated_bytes == full.memory.allocated_bytes
    assert st.estimate(gpt, CLUSTER, STRATEGY.with_(checkpoint="layers:0-15")).step_time_s == pytest.approx(
        st.estimate(gpt, CLUSTER, STRATEGY.with_(checkpoint="full")).step_time_s, rel=1e-12
    )


def test_blocks_concern_the_stage_that_holds_them(gpt: st.Workload) -> None:
    plain, second = (stage_bytes(gpt, STRATEGY.with_(checkpoint=c)) for c in ("none", "layers:4-7"))
    assert [b < a for a, b in zip(plain, second, strict=True)] == [False, True, False, False]
    assert [a == b for a, b in zip(plain, second, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_each_stage_recomputes_the_fewest_blocks_that_do(gpt: st.Workload, share: float) -> None:
    """Blocks are equal, so that with one fewer, wherever it lies, a stage would take more than the budget."""
    results = {c: st.schedule(gpt, CLUSTER, STRATEGY.with_(checkpoint=c)) for c in ("none", "full")}
    least, most = (results[c].memory.device_bytes for c in ("full", "none"))
    budget = least + share * (most - least)
    how = st.choose_checkpoint(gpt, CLUSTER, STRATEGY.with_(checkpoint=f"optimal:{budget / 2**20:.3f}MiB"))
    chosen = st.schedule(gpt, CLUSTER, how)
    assert chosen.memory.device_bytes <= budget
    assert results["none"].step_time_s <= chosen.step_time_s < results["full"].step_time_s
    around = chosen.memory.device_bytes - max(stage_bytes(gpt, how))
    text = how.checkpoint
    recomputed = [n for n in range(16) if blocks_within(text, n, n + 1) != "none"] if "[" not in text else []
    counts = [sum(4 * s <= n < 4 * s + 4 for n in recomputed) for s in range(4)]
    assert counts == sorted(counts, reverse=True)  # earlier stages have more in flight
    for stage in range(4):
        own = [n for n in recomputed if n // 4 == stage]
        for left in own:
            fewer = [n for n in recomputed if n != left]
            names = "layers:" + ",".join(map(str, fewer)) if fewer else "none"
            assert stage_bytes(gpt, STRATEGY.with_(checkpoint=names))[stage] + around > budget


def test_too_little_names_what_the_stage_needs(gpt: st.Workload) -> None:
    with pytest.raises(StrategyError, match=r"stage 0, with 4 micro-batches in flight, takes at least .* GiB"):
        st.schedule(gpt, CLUSTER, STRATEGY.with_(checkpoint="optimal:1GiB"))
    with pytest.raises(UnsupportedError, match="each stage holds several chunks"):
        st.schedule(gpt, CLUSTER, STRATEGY.with_(checkpoint="optimal", schedule="interleaved", chunks=2))
    with pytest.raises(StrategyError, match=r"a stage begins with block 4, so that \[3-4\]"):
        st.schedule(gpt, CLUSTER, STRATEGY.with_(checkpoint="layers:[3-4]"))
    with pytest.raises(StrategyError, match="has blocks 0 to 15, no block 16"):
        st.schedule(gpt, CLUSTER, STRATEGY.with_(checkpoint="layers:16"))
    with pytest.raises(UnsupportedError, match="one stage alone"):
        st.checkpoint_curve(gpt, CLUSTER, STRATEGY)


def test_explicit_blocks_counted_within_a_range() -> None:
    assert blocks_within("layers:0-3,[5-6],8", 4, 8) == "layers:[1-2]"
    assert blocks_within("layers:0-3,[5-6],8", 0, 4) == "layers:0-3"
    assert blocks_within("layers:0-3", 4, 8) == "none"
    assert blocks_within("every:2", 4, 8) == "every:2"


def test_selective_recomputation_stands_on_the_curve_of_unfused_attention() -> None:
    unfused = st.runtime("torch-eager").with_(fused_attention=False)
    curve = st.checkpoint_curve("gpt2-small", "1x rtx-3090", "micro_batch=8,precision=bf16-amp", runtime=unfused, budgets=4)
    selective = next(p for p in curve.rules if p.name == "selective")
    beaten = all(p.step_time_s > selective.step_time_s for p in curve.optimal if p.device_bytes <= selective.device_bytes)
    assert beaten == any("selective beats" in line for line in curve.findings)
