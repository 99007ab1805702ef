"""The comparison with Sailor's plans: its figures are met again, and beaten."""

import pytest

from validation.allocation import SailorCase, compare, evaluate_published, published_plan

CASE = SailorCase.read()


@pytest.mark.parametrize("cluster", CASE.data["cluster"], ids=lambda c: str(c["V100-16"]))
def test_published_plans_take_as_long_as_published(cluster):
    assert 1 / evaluate_published(CASE, cluster).step_time_s == pytest.approx(cluster["rendezvous_steps_per_s"], rel=0.01)
    plan = published_plan(cluster)
    for device, count in CASE.counts(cluster).items():
        assert sum(s.copies * s.template.devices(device) for s in plan) <= count
    assert sum(s.samples for s in plan) >= CASE.data["model"]["global_batch"]


def test_ours_are_faster_than_published_and_slower_than_the_bounds():
    report = compare()
    aggregate = [0.313, 0.783, 1.253]
    for row, bound in zip(report.rows, aggregate, strict=True):
        assert row.gain >= 1.2
        assert row.replica_bound_steps_per_s == pytest.approx(bound, abs=1e-3)
        assert row.steps_per_s < bound
        assert row.steps_per_s < row.bound_steps_per_s
    assert "gain" in str(report)
    assert len(report.to_dict()["rows"]) == 3


def test_memory_is_kept_to_and_every_sample_processed():
    from simtrain.planner.allocation.search import search

    counts = CASE.counts(CASE.data["cluster"][0])
    market = CASE.market(counts)
    for proposal in search(market).proposals[:5]:
        assert sum(s.samples for s in proposal.shares) == 1024
        for share in proposal.shares:
            stages = share.template.stages
            for s, stage in enumerate(stages):
                held = market.memory_bytes(stage.unit, share.template.micro_batch, len(stages) - s)[stage.start, stage.end - 1]
                assert held <= market.spare_bytes(stage.unit, share.template.micro_batch)
