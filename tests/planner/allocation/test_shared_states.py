"""Replicas that share the optimizer's states, sequences split over tensor-parallel devices, recipes by stage, plans that are stated."""

from dataclasses import replace

import pytest

import simtrain as st
from simtrain.core.errors import InputError, StrategyError, UnknownNameError, UnsupportedError
from simtrain.core.result import MemoryKind
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import ReplicaGroup, ReplicaTemplate, StageTemplate
from simtrain.planner.allocation.place import PlacedShare
from simtrain.planner.allocation.prices import Share, StageUse, Template, Unit
from simtrain.planner.allocation.program import read
from simtrain.planner.allocation.stated import stated
from simtrain.step.shard import even_cuts
from simtrain.step.states import persistent

GPT = "gpt2-small"
V100, RTX = "V100-SXM2-16GB", "RTX3090-24GB"


def asker(cluster, batch, **options):
    given = {"tensors": (1, 2), "micro_batches": (1, 2, 4), "checkpoints": ("none",)} | options
    return st.Allocator(st.workload(GPT, seq_len=128), cluster, batch, **given)


def even(asked, data, tensor, stages, micro_batches, *, sequence=False):
    """Equal replicas on the ranks that Megatron-LM would give them."""
    (kind,) = asked.job.kinds
    template = Template(tuple(StageUse(Unit(kind, tensor, "none", sequence), *cut) for cut in even_cuts(asked.job.workload, stages)), 2)
    copies = tuple(tuple(tuple((s * data + d) * tensor + t for t in range(tensor)) for s in range(stages)) for d in range(data))
    return (PlacedShare(Share(template, data, micro_batches), copies),)


@pytest.mark.parametrize("framework", ["torch-eager", "megatron", "deepspeed"])
@pytest.mark.parametrize(
    ("data", "tensor", "stages", "zero", "sequence"),
    [(2, 1, 4, 1, False), (4, 1, 2, 1, False), (2, 2, 2, 0, True), (2, 2, 2, 1, True), (1, 4, 2, 0, True)],
)
def test_even_plans_take_what_schedule_says(framework, data, tensor, stages, zero, sequence):
    how = runtime(framework).with_(overlap_communication=False, overlap_gather=False)
    options = {"tensors": (tensor,), "micro_batches": (2,), "checkpoints": ("none",)}
    asked = st.Allocator(GPT, "8x v100-sxm2-16gb", data * 2 * 6, runtime=how, precision="fp16-amp", templates=False, **options)
    reading = read(replace(asked.job, zero=zero), asked.market, even(asked, data, tensor, stages, 6, sequence=sequence))
    degrees = {"data": data, "tensor": tensor, "pipeline": stages, "zero": zero, "sequence_parallel": sequence}
    strategy = st.Strategy(**degrees, micro_batch=2, accumulation=6, precision="fp16-amp")
    expected = st.schedule(asked.job.workload, asked.job.cluster, strategy, runtime=how)
    assert reading.step_time_s == pytest.approx(expected.step_time_s, rel=0.01)
    assert max(m.allocated_bytes for m in reading.memory) == pytest.approx(expected.memory.allocated_bytes, rel=1e-6)


@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_states_are_priced_as_so_many_replicas_hold_them(replicas):
    asked = asker("2x v100-sxm2-16gb", 8, tensors=(1,), templates=False)
    unit = Unit(V100, 1)
    setting = replace(asked.job, zero=1).setting(unit, 2, 3, 2, replicas)
    pieces = asked.job.pieces(setting, tuple((i, i + 1) for i in range(asked.market.layers)))
    held = [float(persistent(setting, asked.job.lane(setting, piece, [(0,)])).sum()) for piece in pieces]
    assert asked.market.shared(replicas, 1.0).prices[unit, 2].fixed_bytes == pytest.approx(held)


def uneven(asked):
    """Three replicas of one model, each cut in its own way."""
    layers = asked.market.layers
    pipeline = Template((StageUse(Unit(V100, 1), 0, 5), StageUse(Unit(V100, 1), 5, layers)), 2)
    mixed = Template((StageUse(Unit(RTX, 1), 0, 9), StageUse(Unit(V100, 1), 9, layers)), 2)
    wide = Template((StageUse(Unit(RTX, 2, "none", sequence=True), 0, layers),), 4)
    return (Share(pipeline, 1, 2), Share(mixed, 1, 4), Share(wide, 1, 5))


def test_replicas_that_are_cut_differently_hold_every_state_once_together():
    asked = asker("3x rtx-3090 + 3x v100-sxm2-16gb", 32, precision="fp16-amp", templates=False)
    whole, shared = (asked.evaluate(uneven(asked), zero=zero) for zero in (0, 1))

    def states(found):
        widths = [s.unit.tensor * p.share.copies for p in found.placement for s in p.share.template.stages]
        return sum(n * m.by_kind_bytes[MemoryKind.OPTIMIZER.value] for n, m in zip(widths, found.memory, strict=True))

    assert states(whole) == pytest.approx(3 * states(shared), rel=1e-6)
    assert all(a.device_bytes < b.device_bytes for a, b in zip(shared.memory, whole.memory, strict=True))
    assert shared.bound_s == whole.bound_s < min(shared.step_time_s, whole.step_time_s)
    assert shared.synchronise_s > 0
    assert sum(shared.breakdown_s.values()) == pytest.approx(shared.step_time_s)


def test_what_fits_only_with_shared_states_is_found():
    options = {"tensors": (1,), "micro_batches": (1,), "checkpoints": ("full",), "precision": "fp16-amp"}
    asked = st.Allocator(st.workload("gpt2-large", seq_len=256), "2x v100-sxm2-16gb + 2x t4", 16, **options)
    alone = st.Allocator(st.workload("gpt2-large", seq_len=256), "2x v100-sxm2-16gb + 2x t4", 16, zeros=(0,), **options)
    found, without = asked.best(), alone.best()
    assert found.step_time_s <= without.step_time_s
    assert found.bound_s == pytest.approx(without.bound_s)
    assert all(m.fits for m in found.memory)


def test_shared_states_are_taken_where_updates_take_long():
    asked = asker("4x a100-sxm4-40gb", 8, tensors=(1,), micro_batches=(2,))
    found = asked.best()
    times = [asked.planning.read(found.placement, zero).step_time_s for zero in (0, 1)]
    assert found.step_time_s == min(times)
    assert found.zero == times.index(min(times))


def test_stages_choose_among_recipes_that_their_devices_have():
    options = {"tensors": (1,), "micro_batches": (4,), "checkpoints": ("none",)}
    work = st.workload("gpt2-medium", seq_len=1024)
    asked = st.Allocator(work, "2x h100-sxm + 2x a100-sxm-80g", 32, precision=("bf16-master", "fp8"), **options)
    found = asked.best()
    rows = {(row["device"][:4], row["precision"]) for row in found.rows()}
    assert ("A100", "fp8") not in rows
    only = st.Allocator(work, "2x h100-sxm + 2x a100-sxm-80g", 32, precision="bf16-master", **options).best()
    assert found.step_time_s <= only.step_time_s * 1.001
    with pytest.raises(InputError, match="different formats"):
        asker("2x h100-sxm", 8, precision=("bf16-amp", "fp8"))
    with pytest.raises(UnsupportedError, match="fp8 products, which A100"):
        asker("2x h100-sxm + 2x a100-sxm-80g", 8, precision=("fp8",))


def test_a_plan_goes_to_a_strategy_and_back():
    cluster = "3x rtx-3090 + 3x v100-sxm2-16gb"
    found = asker(cluster, 32, tensors=(1,), precision="fp16-amp").best()
    again = st.read_plan(st.workload(GPT, seq_len=128), cluster, stated(found))
    assert again.step_time_s == pytest.approx(found.step_time_s)
    assert again.bound_s <= again.step_time_s


def test_bad_plans():
    stage = StageTemplate("v100-sxm2-16gb")
    group = ReplicaGroup(ReplicaTemplate((stage,), 2), 2, 2)
    with pytest.raises(UnsupportedError, match=r"st\.read_plan"):
        st.schedule(GPT, "2x v100-sxm2-16gb", st.Strategy(plan=(group,)))
    with pytest.raises(StrategyError, match="no plan of replicas"):
        st.read_plan(GPT, "2x v100-sxm2-16gb", st.Strategy())
    with pytest.raises(UnsupportedError, match="offload=optimizer beside a plan"):
        st.read_plan(GPT, "2x v100-sxm2-16gb", st.Strategy(offload="optimizer", plan=(group,)))
    with pytest.raises(UnknownNameError, match="v100-sxm2-16gb"):
        st.read_plan(GPT, "2x rtx-3090", st.Strategy(precision="fp16-amp", plan=(group,)))
    with pytest.raises(UnsupportedError, match="ZeRO stages 0 and 1, not 2"):
        asker("2x v100-sxm2-16gb", 8, zeros=(0, 2))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ReplicaGroup(ReplicaTemplate((StageTemplate(),), 2), 0, 4), "copies must be a whole number of at least 1, not 0"),
        (lambda: ReplicaGroup(ReplicaTemplate((StageTemplate(),), 2), 1.5, 4), "copies must be a whole number"),
        (lambda: ReplicaTemplate((StageTemplate(),), 0), "micro_batch must be a whole number"),
        (lambda: ReplicaTemplate((), 1), "at least one stage"),
        (lambda: StageTemplate(context=0), "context must be a whole number"),
        (lambda: StageTemplate(layers=(0, -5)), "layers must be"),
    ],
)
def test_parts_of_plans_that_cannot_be(make, told):
    with pytest.raises(StrategyError, match=told):
        make()


def test_what_is_chosen_for_each_device_by_itself_is_no_part_of_allocations():
    plan = (ReplicaGroup(ReplicaTemplate((StageTemplate(),), 2), 2, 2),)
    with pytest.raises(UnsupportedError, match="checkpoint=optimal of devices that differ is not modelled"):
        st.read_plan(GPT, "2x v100-sxm2-16gb", st.Strategy(precision="fp16-amp", checkpoint="optimal", plan=plan))
    with pytest.raises(InputError, match=r"no tensor width of 3 .* at most 2 of a kind"):
        asker("2x v100-sxm2-16gb", 8, tensors=(3,))
    with pytest.raises(InputError, match="memory_margin must be a share"):
        asker("2x v100-sxm2-16gb", 8, memory_margin=-0.5)


def test_a_plan_of_ones_own_that_does_not_fit_says_so():
    plan = (ReplicaGroup(ReplicaTemplate((StageTemplate(),), 64), 2, 1),)
    read_one = st.read_plan(GPT, "2x v100-sxm2-16gb", st.Strategy(precision="fp16-amp", plan=plan))
    assert not read_one.fits
    assert "DOES NOT FIT" in str(read_one)
    assert read_one.to_dict()["fits"] is False
