"""Whole steps on TPU slices: what rows mean, and how time depends on slices and axes."""

import pytest

from simtrain.core import catalog
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import Strategy
from simtrain.step.predict import estimate, schedule
from validation import tpu_slices
from validation.kernels_published import load_table

ROWS = load_table("tpu_transformers")["row"]
V5E, V5P, V4 = 0, 12, 18


def test_measured_steps_follow_from_the_printed_mfu():
    row = ROWS[V5E]
    share = tpu_slices.counted_flops(row) / tpu_slices.measured_s(row) / catalog.device(row["device"]).peak_flops["bf16"]
    assert share == pytest.approx(0.611, rel=0.005)  # as the source prints it


def test_slices_have_the_chips_and_ports_of_their_rows():
    for row in ROWS[::5]:
        cluster = tpu_slices.slices(row, catalog.device(row["device"]))
        assert cluster.size == row["chips"]
    cluster = tpu_slices.slices(ROWS[V5P], catalog.device("tpu-v5p"))
    links = (cluster.nodes[0].peer_link, cluster.nodes[0].nic)
    assert sum(link.bandwidth_bytes_per_s for link in links) == pytest.approx(catalog.link("ici-v5p").bandwidth_bytes_per_s)


def test_sums_between_slices_stand_behind_backward():
    one, two = ROWS[V4], ROWS[V4 + 1]
    added = tpu_slices.predict_s(two) - tpu_slices.predict_s(one)
    parameters = tpu_slices.tpu_workload(one).parameter_count
    port = catalog.link("dcn-200g").sustained_bytes_per_s
    # two slices exchange fp32 gradients once each way: a host's share is that of its four chips
    assert added == pytest.approx(4 * parameters / one["chips"] * 4 / port, rel=0.05)


def test_one_share_per_chip_beats_one_mfu_per_chip_on_groups_held_out():
    report = tpu_slices.compare_slices([V5E, V5E + 1, V5P, V5P + 2, V4, V4 + 1])
    held, null = report.errors("fitted_s"), report.errors("null_s")
    assert held.mean < null.mean
    assert all(0.5 < share < 1 for share in report.shares.values())
    assert "held out" in str(report)
    assert report.to_dict()["variants_looked_at"] > 1


def test_the_closed_form_waits_for_reductions_as_the_longest_path_does():
    row = ROWS[V5P + 1]
    device = catalog.device(row["device"])
    chosen = Strategy(data=32, tensor=4, zero=3, shard=16, micro_batch=8, precision="bf16-master", checkpoint="full")
    model, cluster = tpu_slices.tpu_workload(row), tpu_slices.slices(row, device)
    for late in (True, False):
        framework = runtime("xla").with_(overlap_communication=not late)
        closed, path = (reader(model, cluster, chosen, runtime=framework).step_time_s for reader in (estimate, schedule))
        assert closed == pytest.approx(path, rel=0.01)


def test_deep_models_shard_fully_although_the_launch_queue_is_full():
    # more kernels a pass than fit the queue: the host of a later block waits for kernels of an earlier one
    model = catalog.workload("llama", layers=64, hidden=256, heads=4, ffn=512, vocabulary=1000, max_positions=64, seq_len=64)
    chosen = Strategy(data=8, zero=3, precision="bf16-amp")
    found = schedule(model, catalog.cluster("dgx-a100-80gb"), chosen, runtime=runtime("fsdp2"))
    free = schedule(model, catalog.cluster("dgx-a100-80gb"), chosen, runtime=runtime("fsdp2").with_(run_ahead_launches=10**6))
    assert found.step_time_s >= 0.999 * free.step_time_s
