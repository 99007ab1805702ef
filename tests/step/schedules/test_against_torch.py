"""The same order as `torch.distributed.pipelining` where it has the schedule."""

from types import SimpleNamespace

import pytest

from simtrain.step.schedules import Action, find

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

LETTER = {Action.FORWARD: "F", Action.BACKWARD: "B"}


def orders(name: str, p: int, v: int, m: int) -> list[list[str]]:
    ours = find(name)
    place = ours.placement(p, v)
    return [[f"{place[r][i.chunk]}{LETTER[i.action]}{i.micro_batch}" for i in ours.order(r, p, v, m)] for r in range(p)]


def theirs(kind: type, p: int, v: int, m: int) -> list[list[str]]:
    stand_in = SimpleNamespace(
        _stages=[None] * v, n_local_stages=v, pp_group_size=p, _n_microbatches=m, microbatches_per_round=p, number_of_rounds=m // p
    )
    steps = [kind._calculate_single_rank_operations(stand_in, rank) for rank in range(p)]
    return [[str(action) for action in rank if action is not None] for rank in steps]


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 2, 8), (4, 3, 16), (8, 2, 8)])
def test_interleaved(p, v, m):
    assert orders("interleaved", p, v, m) == theirs(schedules.ScheduleInterleaved1F1B, p, v, m)


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 3, 6)])
def test_breadth_first(p, v, m):
    """Theirs sends the micro-batches of a chunk back in reverse, which neither changes the bubble nor the peak."""
    ours, other = orders("breadth-first", p, v, m), theirs(schedules.ScheduleLoopedBFS, p, v, m)
    for mine, rank in zip(ours, other, strict=True):
        assert mine[: m * v] == rank[: m * v]
        for start in range(m * v, 2 * m * v, m):
            assert mine[start : start + m] == rank[start : start + m][::-1]
