"""Offloading: the arithmetic of ZeRO-Offload (arXiv 2101.06840) and ZeRO-Infinity (arXiv 2104.07857), and conservation."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from simtrain.core.program import TermKind
from simtrain.cost.fabric import Fabric
from simtrain.cost.host import drive_copy, host_copy, host_update
from simtrain.step.layout import lay_out
from simtrain.step.ledger import ledger
from simtrain.step.lower import lower
from simtrain.step.results import memory_report
from simtrain.step.setting import resolve

MACHINE = "dgx-2"
TEN_BILLION = {"layers": 50, "hidden": 4096, "heads": 32, "vocabulary": 50257, "seq_len": 1024}
SMALL = {"layers": 6, "hidden": 512, "heads": 8, "vocabulary": 1024, "seq_len": 512}


def how(**changes):
    return st.Strategy(**{"micro_batch": 4, "precision": "fp16-master", **changes})


def moved_bytes(workload, strategy, stream, *, runtime="deepspeed", cluster=MACHINE):
    """What the first rank's terms on a stream move in a step."""
    program = lower(resolve(workload, cluster, strategy, runtime)).program
    resource = {"to host": "host link out", "from host": "host link in", "drives read": "drives read", "drives write": "drives write"}[
        stream
    ]
    total = 0.0
    for i in np.flatnonzero(program.kind == TermKind.OFFLOAD):
        if program.streams[program.stream[i]].name == stream:
            part = slice(program.demand_pointer[i], program.demand_pointer[i + 1])
            for used, amount in zip(program.demand_resource[part], program.demand_amount[part], strict=True):
                total += amount if program.resources[used].name.endswith(resource) else 0.0
    return total


def parameters(workload):
    return sum(p.elements for layer in workload for p in layer.parameters if not p.tied_to)


# --- ZeRO-Offload


def test_two_of_sixteen_bytes_per_parameter_stay_and_fourteen_go():
    gpt = st.workload("gpt", **TEN_BILLION)
    count = parameters(gpt)
    whole = st.estimate(gpt, MACHINE, how(checkpoint="full"), runtime="deepspeed").memory
    moved = st.estimate(gpt, MACHINE, how(checkpoint="full", offload="optimizer+gradients"), runtime="deepspeed").memory
    assert moved.by_kind_bytes["parameter"] == pytest.approx(2 * count, rel=1e-3)  # a padded vocabulary
    assert moved.by_kind_bytes.get("gradient", 0.0) < 0.05 * 2 * count  # of the layer at work, and of the tied weight
    assert moved.by_kind_bytes.get("optimizer", 0.0) == 0.0
    assert whole.by_kind_bytes["optimizer"] == pytest.approx(12 * count, rel=1e-3)
    assert moved.host_bytes == pytest.approx(14 * count, rel=0.02)  # and pinned buffers


def test_ten_billion_parameters_train_on_one_v100_with_32_gib():
    """The paper trains 10 billion (batch 10) on one V100 at 40 TFLOP/s and 13 billion at most; PyTorch alone stops at 1.4 billion."""
    gpt = st.workload("gpt", **TEN_BILLION)
    strategy = how(micro_batch=10, checkpoint="full", offload="optimizer+gradients")
    result = st.schedule(gpt, MACHINE, strategy, runtime="deepspeed")
    assert result.fits
    assert not st.estimate(gpt, MACHINE, strategy.with_(offload="none"), runtime="deepspeed").fits
    assert result.model_flops / result.step_time_s > 30e12
    larger = st.workload("gpt", **{**TEN_BILLION, "layers": 62})
    assert 12.5e9 < parameters(larger) < 13.5e9
    assert st.estimate(larger, MACHINE, strategy.with_(micro_batch=4), runtime="deepspeed").fits
    beyond = st.workload("gpt", **{**TEN_BILLION, "layers": 80})
    assert not st.estimate(beyond, MACHINE, strategy.with_(micro_batch=1), runtime="deepspeed").fits


@pytest.mark.parametrize("offload", ["optimizer", "optimizer+gradients"])
def test_four_bytes_per_parameter_cross_the_link_in_a_step(offload):
    gpt = st.workload("gpt", **SMALL)
    count = parameters(gpt)
    assert moved_bytes(gpt, how(offload=offload), "to host") == pytest.approx(2 * count)
    assert moved_bytes(gpt, how(offload=offload), "from host") == pytest.approx(2 * count)


def test_a_delayed_update_hides_behind_the_next_step():
    gpt = st.workload("gpt", **{**SMALL, "hidden": 2048, "heads": 16})
    for micro_batch in (1, 4, 32):
        now = st.schedule(gpt, MACHINE, how(micro_batch=micro_batch, offload="optimizer+gradients"), runtime="deepspeed")
        strategy = how(micro_batch=micro_batch, offload="optimizer+gradients+delayed")
        late = st.schedule(gpt, MACHINE, strategy, runtime="deepspeed")
        sends = late.busy_s["from host"]
        assert late.step_time_s < now.step_time_s
        # the slower of the update and of passes, then the weights go back
        assert late.step_time_s >= max(late.busy_s["host update"], late.busy_s["compute"] + sends) * (1 - 1e-9)
        assert late.step_time_s <= 1.05 * (max(late.busy_s["host update"], late.busy_s["compute"]) + sends)
        assert st.simulate(gpt, MACHINE, strategy, runtime="deepspeed").step_time_s >= late.step_time_s * (1 - 1e-9)
        assert any("one step late" in line for line in late.assumptions)


def test_each_of_many_ranks_moves_its_share_alone():
    gpt = st.workload("gpt", **SMALL)
    count = parameters(gpt)
    for zero in (2, 3):
        for stream in ("to host", "from host"):
            moved = moved_bytes(gpt, how(data=4, zero=zero, offload="optimizer+gradients"), stream)
            assert moved == pytest.approx(2 * count / 4)


def test_gradients_of_later_micro_batches_are_added_to_those_that_left():
    gpt = st.workload("gpt", **SMALL)
    count = parameters(gpt)
    strategy = how(accumulation=3, offload="optimizer+gradients")
    assert moved_bytes(gpt, strategy, "to host") == pytest.approx(3 * 2 * count)
    assert moved_bytes(gpt, strategy, "from host") == pytest.approx((2 * 2 + 2) * count)  # back twice, then weights


def test_the_update_on_the_host_takes_as_long_as_published():
    """Table 4 of the paper: 0.22 s, 1.03 s and 2.57 s for 1, 4 and 10 billion parameters; the rate is from the last."""
    fabric = Fabric(st.cluster(MACHINE))
    for count, seconds in ((1e9, 0.22), (4e9, 1.03), (10e9, 2.57)):
        assert host_update(fabric, [0], 28 * count).time_s == pytest.approx(seconds, rel=0.2)


# --- ZeRO-Infinity: arithmetic intensity, floating-point operations per byte moved


def intensity(workload, strategy, *streams, blocks_only=False):
    flops = workload.model_flops(strategy.micro_batch) * strategy.accumulation
    return flops / sum(moved_bytes(workload, strategy, s) for s in streams)


def test_parameters_and_gradients_move_once_per_sequence_times_batch():
    gpt = st.workload("gpt", **{**SMALL, "hidden": 2048, "heads": 16})
    strategy = how(zero=3, offload="optimizer+gradients+parameters", micro_batch=8)
    dense = 6 * parameters(gpt) * 8 * gpt.sequence
    moved = moved_bytes(gpt, strategy, "to host") + moved_bytes(gpt, strategy, "from host")
    embedding = 2 * 2 * sum(p.elements for p in next(iter(gpt)).parameters)
    # weights in for forward and backward, gradients out: 6 bytes per parameter; what is no block stays from forward to backward
    assert dense / (moved + embedding) == pytest.approx(8 * gpt.sequence, rel=0.05)


def test_optimizer_states_on_drives_have_a_quarter_of_that():
    gpt = st.workload("gpt", **SMALL)
    strategy = how(offload="optimizer:nvme+gradients", micro_batch=8)
    dense = 6 * parameters(gpt) * 8 * gpt.sequence
    moved = moved_bytes(gpt, strategy, "drives read") + moved_bytes(gpt, strategy, "drives write")
    assert dense / moved == pytest.approx(8 * gpt.sequence / 4, rel=1e-9)


@pytest.mark.parametrize(("checkpoint", "every"), [("full", 1), ("every:2", 2)])
def test_activation_checkpoints_have_24_times_hidden_times_their_distance(checkpoint, every):
    gpt = st.workload("gpt", **SMALL)
    strategy = how(offload="activations", checkpoint=checkpoint, micro_batch=8)
    tokens, hidden = 8 * gpt.sequence, SMALL["hidden"]
    per_block = 2 * 4 * 12 * hidden**2 * tokens  # products of a block, forward, again, and twice for backward
    segments = SMALL["layers"] // every - 1  # backward begins with the last, which stays
    moved = moved_bytes(gpt, strategy, "to host") + moved_bytes(gpt, strategy, "from host")
    assert per_block * every * segments / moved == pytest.approx(24 * hidden * every)


@pytest.mark.parametrize("factor", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_efficiency_lies_between_no_overlap_and_the_larger_of_both(factor):
    """The formula of the paper, AIT * bw / (AIT * bw + peak), is computation over computation plus copies: no overlap at all."""
    cluster = st.cluster(MACHINE)
    node = cluster.nodes[0]
    link = dataclasses.replace(node.host_link, bandwidth_bytes_per_s=node.host_link.bandwidth_bytes_per_s * factor, latency_s=0.0)
    fast = dataclasses.replace(cluster, nodes=(dataclasses.replace(node, host_link=link, hosts=2000),))
    gpt = st.workload("gpt", **SMALL)
    result = st.schedule(gpt, fast, how(offload="activations", checkpoint="full", micro_batch=16), runtime="deepspeed")
    alone = st.schedule(gpt, fast, how(checkpoint="full", micro_batch=16), runtime="deepspeed")
    copies = result.busy_s["to host"] + result.busy_s["from host"]
    published = alone.step_time_s / (alone.step_time_s + copies)
    reached = alone.step_time_s / result.step_time_s
    assert published * (1 - 1e-9) <= reached <= 1 + 1e-9
    assert result.step_time_s >= max(result.busy_s["to host"], result.busy_s["from host"])
    if factor == 100.0:
        assert reached > 0.999
    if factor == 0.01:
        assert result.bound_by == "offload"
        assert any("thrashing" in line for line in result.assumptions)


def test_a_trillion_parameters_fit_one_machine_with_its_drives():
    """The paper's claim for one DGX-2: 16 bytes per parameter on drives, where host memory alone is ten times too small."""
    gpt = st.workload("gpt", layers=500, hidden=12800, heads=100, vocabulary=50257, seq_len=1024)
    count = parameters(gpt)
    assert count == pytest.approx(1e12, rel=0.02)
    everything = {"nvme": "optimizer:nvme+gradients:nvme+parameters:nvme+activations", "host": "optimizer+gradients+parameters+activations"}
    found = {}
    for place, offload in everything.items():
        strategy = how(data=16, zero=3, checkpoint="full", offload=offload)
        found[place] = memory_report(lay_out(resolve(gpt, MACHINE, strategy, "deepspeed")))
    assert found["nvme"].fits
    assert found["nvme"].nvme_bytes == pytest.approx(16 * count, rel=0.01)
    assert found["nvme"].host_bytes < 1.5e12
    assert not found["host"].fits
    assert found["host"].host_bytes > 10 * found["host"].host_capacity_bytes


# --- links


def test_ranks_behind_one_switch_share_its_uplink():
    fabric = Fabric(st.cluster(MACHINE))
    size = 1e9
    alone = host_copy(fabric, [0], size, out=True).time_s
    assert host_copy(fabric, [0, 4, 8, 12], size, out=True).time_s == pytest.approx(alone)
    assert host_copy(fabric, range(16), size, out=True).time_s == pytest.approx(4 * alone, rel=1e-3)
    assert size / host_copy(fabric, range(16), size, out=True).time_s == pytest.approx(3.0e9, rel=0.1)  # ZeRO-Infinity, figure 2b
    assert size / drive_copy(fabric, range(16), size, reads=True).time_s == pytest.approx(1.6e9, rel=0.1)


def test_both_directions_run_at_once():
    out, back = (set(host_copy(Fabric(st.cluster(MACHINE)), [0], 1.0, out=o).loads) for o in (True, False))
    assert {r.name for r in out & back} == {"node 0 host memory"}


# --- the ledger


strategies = some.builds(
    st.Strategy,
    micro_batch=some.sampled_from([1, 4]),
    accumulation=some.sampled_from([1, 2]),
    precision=some.sampled_from(["fp16-master", "fp16-amp", "fp32"]),
    checkpoint=some.sampled_from(["none", "full", "every:2", "layers:1,3"]),
    zero=some.just(3),
    data=some.sampled_from([1, 2]),
    offload=some.sampled_from(
        ["activations", "activations(0,3)", "optimizer", "optimizer+gradients", "optimizer:nvme+gradients:nvme+parameters:nvme+activations"]
    ),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies)
def test_what_leaves_comes_back_and_readers_agree(strategy):
    gpt = st.workload("gpt", **{**SMALL, "hidden": 256, "heads": 4})
    if strategy.checkpoint == "every:2" and strategy.moved.blocks:
        strategy = strategy.with_(offload="activations")
    lowered = lower(resolve(gpt, MACHINE, strategy, "fsdp2"))
    lane = lowered.layout.lanes[0]
    book = ledger(lowered.layout.setting, lane, lowered.layout.plan)
    transient = book.moments[-1] - book.moments[0]
    kinds = list(st.estimate(gpt, MACHINE, strategy, runtime="fsdp2").memory.by_kind_bytes)
    assert kinds
    assert transient[3] == pytest.approx(0.0, abs=1e-3)  # activations
    assert book.moments.min() >= -1e-3
    plain = ledger(resolve(gpt, MACHINE, strategy.with_(offload="none"), "fsdp2"), lane, lowered.layout.plan)
    assert book.peak_bytes <= plain.peak_bytes + 0.05 * plain.peak_bytes + 2**24
    scheduled, simulated = (read(gpt, MACHINE, strategy, runtime="fsdp2") for read in (st.schedule, st.simulate))
    estimated = st.estimate(gpt, MACHINE, strategy, runtime="fsdp2")
    assert sum(scheduled.breakdown_s.values()) == pytest.approx(scheduled.step_time_s, rel=1e-9)
    assert simulated.step_time_s == pytest.approx(scheduled.step_time_s, rel=0.15)
    assert simulated.step_time_s >= scheduled.step_time_s * (1 - 1e-9)  # what meets on host memory slows
    assert estimated.step_time_s == pytest.approx(scheduled.step_time_s, rel=0.03)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies)
def test_simulation_is_the_schedule_where_nothing_meets(strategy):
    """One rank per switch and host memory without end: every link has one stream."""
    cluster = st.cluster(MACHINE)
    roomy = dataclasses.replace(cluster, nodes=(dataclasses.replace(cluster.nodes[0], hosts=10**6, host_group=0),))
    gpt = st.workload("gpt", **{**SMALL, "hidden": 256, "heads": 4})
    strategy = strategy.with_(data=1, checkpoint="none" if strategy.moved.blocks else strategy.checkpoint)
    strategy = strategy.with_(offload=strategy.offload.replace(":nvme", ""))
    runtime = st.runtime("fsdp2").with_(communication_share=0.0)
    scheduled, simulated = (read(gpt, roomy, strategy, runtime=runtime) for read in (st.schedule, st.simulate))
    assert simulated.step_time_s == pytest.approx(scheduled.step_time_s, rel=1e-5)


def test_a_step_is_never_shorter_than_without_offloading_but_for_the_update():
    gpt = st.workload("gpt", **SMALL)
    # the launches of passes around the update on the device count as the host's, and go with it
    runtime = st.runtime("deepspeed").with_(flat_gradients=False)
    plain = st.schedule(gpt, MACHINE, how(), runtime=runtime)
    for offload in ("optimizer", "optimizer+gradients", "activations"):
        moved = st.schedule(gpt, MACHINE, how(offload=offload), runtime=runtime)
        assert moved.step_time_s >= plain.step_time_s - plain.breakdown_s["optimizer"] - 1e-9


def test_faster_hosts_and_links_never_make_a_step_longer():
    cluster = st.cluster(MACHINE)
    gpt = st.workload("gpt", **SMALL)
    times = []
    for hosts in (1, 2, 8):
        node = dataclasses.replace(cluster.nodes[0], hosts=hosts)
        times.append(
            st.schedule(gpt, dataclasses.replace(cluster, nodes=(node,)), how(offload="optimizer"), runtime="deepspeed").step_time_s
        )
    assert times == sorted(times, reverse=True)


# --- what does not fit, what is refused


def test_a_full_host_is_said_with_a_fix():
    gpt = st.workload("gpt", **TEN_BILLION)
    box = "box-4x-rtx3090"
    result = st.estimate(gpt, box, how(checkpoint="full", zero=3, offload="optimizer+gradients+parameters"), runtime="deepspeed")
    assert not result.fits
    assert result.memory.over_bytes < 0
    assert "OUT OF HOST MEMORY" in str(result)
    assert any("out of memory on the host" in line and "nvme" in line for line in result.assumptions)


@pytest.mark.parametrize(
    ("cluster", "changes", "error", "said"),
    [
        (MACHINE, {"offload": "optimizer+gradients+parameters"}, StrategyError, "use zero=3"),
        (MACHINE, {"offload": "optimizer+gradients", "data": 2}, StrategyError, "use zero=2 or 3"),
        (MACHINE, {"offload": "optimizer+gradients", "pipeline": 2}, UnsupportedError, "use offload=optimizer, or pipeline=1"),
        (MACHINE, {"offload": "activations", "pipeline": 2, "schedule": "zb-h1", "accumulation": 4}, UnsupportedError, "schedule=1f1b"),
        (MACHINE, {"offload": "activations", "pipeline": 2, "checkpoint": "optimal"}, UnsupportedError, "checkpoint=layers:"),
        (MACHINE, {"offload": "activations(9)", "pipeline": 2}, StrategyError, "blocks 0 to 5"),
        (MACHINE, {"offload": "activations(2)", "pipeline": 2}, StrategyError, "nothing follows it (on its stage)"),
        (
            MACHINE,
            {"offload": "optimizer", "data": 2, "compression": "16-bit", "precision": "fp16-amp"},
            UnsupportedError,
            "compression=none",
        ),
        (MACHINE, {"offload": "activations(9)"}, StrategyError, "blocks 0 to 5"),
        (MACHINE, {"offload": "activations(1)", "checkpoint": "every:2"}, StrategyError, "recomputed together"),
        ("box-4x-rtx3090", {"offload": "optimizer:nvme"}, UnsupportedError, "states no drives"),
        ("1x v100-sxm2-32gb", {"offload": "optimizer"}, UnsupportedError, "needs to know the host"),
        ("1x cpu-core", {"offload": "optimizer", "precision": "fp32"}, InputError, "computes in host memory already"),
    ],
)
def test_what_cannot_be_moved_is_refused_with_a_fix(cluster, changes, error, said):
    gpt = st.workload("gpt", **SMALL)
    with pytest.raises(error) as caught:
        st.schedule(gpt, cluster, how(**changes))
    assert said in str(caught.value)


def test_a_pipeline_moves_its_optimizer():
    gpt = st.workload("gpt", **SMALL)
    plain = st.schedule(gpt, MACHINE, how(pipeline=2, accumulation=4))
    moved = st.schedule(gpt, MACHINE, how(pipeline=2, accumulation=4, offload="optimizer"))
    assert moved.memory.device_bytes < plain.memory.device_bytes
    assert moved.busy_s["host update"] > 0
    assert moved.step_time_s > plain.step_time_s - plain.breakdown_s["optimizer"]


@pytest.mark.parametrize(("schedule", "flying"), [("1f1b", (2, 1)), ("gpipe", (4, 4))])
def test_stages_of_a_pipeline_move_what_each_micro_batch_in_flight_saves(schedule, flying):
    """What the first stage no longer holds is what the host holds of it: a moved block's activations for every micro-batch in flight."""
    gpt = st.workload("gpt", **SMALL)
    common = {"pipeline": 2, "accumulation": 4, "schedule": schedule}
    plain, moved, one = (
        st.schedule(gpt, MACHINE, how(**common, **changes)) for changes in ({}, {"offload": "activations"}, {"offload": "activations(0)"})
    )
    assert sum(moved.breakdown_s.values()) == pytest.approx(moved.step_time_s)
    assert st.simulate(gpt, MACHINE, how(**common, offload="activations")).step_time_s >= moved.step_time_s * (1 - 1e-9)
    block = one.memory.host_bytes / flying[0]
    assert moved.memory.host_bytes == pytest.approx((1 * flying[0] + 2 * flying[1]) * block), (
        "stages of three blocks: the last two, or one, stay"
    )
    assert plain.memory.allocated_bytes - moved.memory.allocated_bytes > 0
    assert plain.step_time_s <= moved.step_time_s


def test_stages_on_one_host_share_it():
    """Updates of all stages meet in one host's memory: together they take as long as those of one stage that holds everything."""
    gpt = st.workload("gpt", **SMALL)
    one, four = (how(pipeline=p, accumulation=4, offload="optimizer") for p in (1, 4))
    alone, frozen, fluid = st.schedule(gpt, MACHINE, one), st.schedule(gpt, MACHINE, four), st.simulate(gpt, MACHINE, four)
    assert frozen.busy_s["host update"] == pytest.approx(alone.busy_s["host update"], rel=0.05)  # both ends hold the tied weight
    assert fluid.step_time_s == pytest.approx(frozen.step_time_s, rel=0.15)
    assert frozen.breakdown_s["offload"] > 0.5 * frozen.busy_s["host update"], "no bubble, though a stage waits for another's host"
    assert sum(frozen.breakdown_s.values()) == pytest.approx(frozen.step_time_s)
