"""Parameters that stages of a pipeline gather are those that the program gathers."""

import pytest

import simtrain as st
from simtrain.planner.arrays.gathers import BESIDE, WIDE, Unit, Wait, gather_counts
from simtrain.planner.arrays.paths import WIDTH
from simtrain.step.fully_sharded import stage_visits
from simtrain.step.layout import lay_out
from simtrain.step.setting import resolve
from simtrain.step.shard import REST

WAITS = WIDE - len(Wait)


@pytest.mark.parametrize(
    ("stages", "schedule", "chunks", "micro_batches"), [(4, "1f1b", 0, 6), (2, "interleaved", 2, 4), (4, "1f1b", 0, 1)]
)
@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize("checkpoint", ["none", "full"])
def test_every_block_that_is_gathered_is_counted(layers, stages, schedule, chunks, micro_batches, checkpoint):
    """Beside a pass of a block, in a wait behind what is no block, or before the first pass of a stage."""
    work = st.workload("gpt", layers=layers, hidden=256, heads=8, vocabulary=2048, seq_len=128)
    strategy = f"data=2,pipeline={stages},schedule={schedule},chunks={chunks},accumulation={micro_batches},zero=3,checkpoint={checkpoint}"
    layout = lay_out(resolve(work, "8x a100-sxm-80g", strategy, "fsdp2"))
    anew = sum(flag and layer != REST for stage in range(stages) for (_, layer), flag in stage_visits(layout, stage))
    positions = layout.plan.positions
    within, between = gather_counts(layout.plan, (layers // positions,) * positions)
    beside = [WIDTH + i for i, (_, gathered, _) in enumerate(BESIDE) if gathered is Unit.BLOCK]
    waits = within[:, WAITS:].sum() + between[:, WAITS:].sum()
    assert within[:, beside].sum() + waits + stages - 1 == anew
    assert between[:, WIDTH:WAITS].sum() == 0, "what is left only moves from one column to another"
