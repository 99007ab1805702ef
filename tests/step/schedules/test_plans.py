"""Every plan runs, in any size; what cannot run is refused by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simtrain.core.errors import StrategyError, UnknownNameError
from simtrain.step.schedules import (
    Action,
    Instruction,
    backward,
    find,
    forward,
    in_flight,
    input_gradient,
    looped_placement,
    makespan,
    names,
    plan,
    register,
    timeline,
    weight_gradient,
)
from simtrain.step.schedules import catalog as schedule_catalog


@st.composite
def settings_of_any_schedule(draw):
    name = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "breadth-first", "zb-h1", "zb-h2", "dualpipe"]))
    p, v, m = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 20))
    if name == "interleaved":
        m *= p
    if name == "dualpipe":
        p, v = 2 * -(-p // 2), 2
        m = 2 * (p + m)
    return name, p, v if name in ("interleaved", "breadth-first", "dualpipe") else 1, m


@settings(deadline=None, max_examples=150)
@given(settings_of_any_schedule())
def test_every_plan_is_consistent(numbers):
    name, p, v, m = numbers
    laid_out = plan(name, p, v, m)
    owner = np.repeat(np.arange(len(laid_out)), np.diff(laid_out.pointer))
    assert np.all(laid_out.predecessor < owner)
    assert np.all(laid_out.before < np.arange(len(laid_out)))
    assert np.all(laid_out.micro_batch[laid_out.predecessor] == laid_out.micro_batch[owner])
    assert np.all(np.abs(laid_out.position[laid_out.predecessor] - laid_out.position[owner]) <= 1)
    for rank in range(p):
        mine = laid_out.of_rank(rank)
        assert laid_out.index[mine].tolist() == list(range(len(mine)))
        assert np.all(laid_out.rank[mine] == rank)
        assert laid_out.before[mine].tolist() == [-1, *mine[:-1]]
        order = find(name).order(rank, p, v, m)
        assert [(i.action, i.chunk, i.micro_batch) for i in order] == list(
            zip(laid_out.action[mine], laid_out.chunk[mine], laid_out.micro_batch[mine], strict=True)
        )
    flight = in_flight(laid_out)
    assert np.all(flight.total >= np.maximum(flight.forward, flight.kept))
    assert np.all(flight.forward >= 1)


@settings(deadline=None, max_examples=100)
@given(settings_of_any_schedule(), st.data())
def test_no_plan_beats_its_bounds(numbers, data):
    """The busiest rank, and one micro-batch on its way through the model and back, each take their time."""
    laid_out = plan(*numbers)
    each = st.lists(st.floats(0.1, 3), min_size=laid_out.positions, max_size=laid_out.positions).map(np.array)
    forward_s, first, second = data.draw(each), data.draw(each), data.draw(each)
    transfer = data.draw(st.floats(0, 1))
    duration = np.stack((forward_s, first + second, first, second))[laid_out.action, laid_out.position]
    total = makespan(laid_out, forward_s, first, second, transfer)
    assert total >= np.bincount(laid_out.rank, duration).max() - 1e-9
    assert total >= (forward_s + first).sum() + 2 * transfer * (numbers[1] > 1) - 1e-9
    run = timeline(laid_out, forward_s, first, second, transfer)
    owner = np.repeat(np.arange(len(laid_out)), np.diff(laid_out.pointer))
    assert np.all(run.start_s[owner] >= run.end_s[laid_out.predecessor] - 1e-9)
    behind = np.flatnonzero(laid_out.before >= 0)
    assert np.all(run.start_s[behind] >= run.end_s[laid_out.before[behind]] - 1e-9)


@settings(deadline=None, max_examples=30)
@given(settings_of_any_schedule(), st.floats(0.1, 2))
def test_slower_is_never_faster(numbers, more):
    laid_out = plan(*numbers)
    assert makespan(laid_out, 1, 1, 1, 0.2) <= makespan(laid_out, 1 + more, 1, 1, 0.2) + 1e-9
    assert makespan(laid_out, 1, 1, 1, 0.2) <= makespan(laid_out, 1, 1, 1, 0.2 + more) + 1e-9


@dataclass(frozen=True)
class Mine:
    """A schedule of one chunk per rank that lists what it is told to."""

    lists: tuple[tuple[Instruction, ...], ...]
    name: str = "mine"
    default_chunks: int = 1

    def placement(self, stages: int, chunks: int):
        return looped_placement(stages, chunks)

    def order(self, rank: int, stages: int, chunks: int, micro_batches: int) -> Sequence[Instruction]:
        return self.lists[rank]


GOOD = (forward(0), forward(1), backward(0), backward(1))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (GOOD, (), "gives rank 1 nothing to do"),
        (GOOD, ("forward",), "gives rank 1 a str where it should list Instructions"),
        (GOOD, GOOD[:3], "forgets the backward pass .* of micro-batch 1 at position 1"),
        (GOOD, GOOD[1:], "forgets the forward pass of micro-batch 0 at position 1"),
        (GOOD, (*GOOD, backward(1)), r"repeats the backward of micro-batch 1 in chunk 0 \(rank 1, instruction 4\).*instruction 3"),
        (GOOD, (*GOOD[:3], input_gradient(1)), "forgets the weight gradient of micro-batch 1 at position 1"),
        (GOOD, (*GOOD, weight_gradient(1)), "in one piece and in parts"),
        ((*GOOD, forward(2)), GOOD, r"asks for forward of micro-batch 2 .* there are 1 chunks and 2 micro-batches"),
        (GOOD, (*GOOD[:3], backward(1, 1)), "asks for backward of micro-batch 1 in chunk 1"),
        (
            (forward(0), backward(0), forward(1), backward(1)),
            (forward(1), forward(0), backward(0), backward(1)),
            "deadlocks: .*rank 0 stands",
        ),
        ((backward(0), forward(0), forward(1), backward(1)), GOOD, "deadlocks: rank 0 .* waits for the forward"),
        ((*GOOD[:3], weight_gradient(1), input_gradient(1)), GOOD, "deadlocks: rank 0 .* weight gradient of micro-batch 1"),
        ((*GOOD, forward(1, with_next=True)), GOOD, "together with the next"),
    ],
)
def test_broken_schedules_are_refused(first, second, message):
    with pytest.raises(StrategyError, match=message):
        plan(Mine((first, second)), 2, 1, 2)


def test_a_deadlock_by_running_together():
    """Alone the forward pass could run; together with the backward pass behind it, it waits for its own consequence."""
    first = (forward(0), forward(1), backward(0), backward(1))
    second = (forward(0), backward(0), forward(1), backward(1))
    assert len(plan(Mine((first, second)), 2, 1, 2)) == 8
    together = (forward(0), forward(1, with_next=True), backward(0), backward(1))
    assert len(plan(Mine((together, second)), 2, 1, 2)) == 8
    cyclic = (forward(0, with_next=True), backward(0), forward(1), backward(1))
    with pytest.raises(StrategyError, match="deadlocks"):
        plan(Mine((cyclic, second)), 2, 1, 2)


@pytest.mark.parametrize(
    ("given_numbers", "message"),
    [
        (("interleaved", 4, 2, 6), r"divisible by the stages \(pipeline=4\): use accumulation=4 or 8"),
        (("interleaved", 4, 2, 3), "use accumulation=4,"),
        (("dualpipe", 3, 2, 12), "even number of stages, not pipeline=3: use 2 or 4"),
        (("dualpipe", 4, 3, 12), "two chunks per rank"),
        (("dualpipe", 4, 2, 6), "use accumulation=8"),
        (("dualpipe", 4, 2, 9), "use accumulation=10"),
        (("1f1b", 4, 2, 8), "'1f1b' runs one chunk per stage, not 2"),
        (("1f1b", 0, 1, 8), "pipeline must be a whole number of at least 1, not 0"),
        (("1f1b", 4, 1, 0), "accumulation must be"),
        (("1f1b", 4, True, 4), "chunks must be"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(given_numbers, message):
    with pytest.raises(StrategyError, match=message):
        plan(*given_numbers)


def test_placements_must_cover_the_model():
    @dataclass(frozen=True)
    class Gap(Mine):
        def placement(self, stages: int, chunks: int):
            return ((0,), (2,))

    @dataclass(frozen=True)
    class Short(Mine):
        def placement(self, stages: int, chunks: int):
            return ((0,),)

    with pytest.raises(StrategyError, match=r"positions \[1\] are on no rank"):
        plan(Gap((GOOD, GOOD)), 2, 1, 2)
    with pytest.raises(StrategyError, match="must place 1 chunks on each of 2 ranks"):
        plan(Short((GOOD, GOOD)), 2, 1, 2)


def test_a_backward_pass_elsewhere_than_its_forward_pass_is_refused():
    @dataclass(frozen=True)
    class Both(Mine):
        def placement(self, stages: int, chunks: int):
            return ((0,), (0,))

    with pytest.raises(StrategyError, match="what it needs was saved by the forward of micro-batch 1"):
        plan(Both(((forward(0), backward(0), backward(1)), (forward(1),))), 2, 1, 2)
    assert len(plan(Both(((forward(0), backward(0)), (forward(1), backward(1)))), 2, 1, 2)) == 4


def test_a_schedule_of_ones_own(monkeypatch):
    monkeypatch.setattr(schedule_catalog, "_registered", {})

    @dataclass(frozen=True)
    class Eager:
        name: str = "eager"
        default_chunks: int = 1

        def placement(self, stages, chunks):
            return looped_placement(stages, chunks)

        def order(self, rank, stages, chunks, micro_batches):
            return [i for m in range(micro_batches) for i in (forward(m), backward(m))]

    mine = register(Eager())
    assert register(Eager()) == mine
    assert "eager" in names()
    assert find("Eager") is not None
    assert makespan(plan("eager", 3, 0, 5), 1, 1, 1) == 5 * 3 * 3  # nothing overlaps
    with pytest.raises(StrategyError, match="there is a schedule '1f1b' already"):
        register(Eager(name="1F1B"))
    with pytest.raises(UnknownNameError, match="did you mean 'eager'"):
        plan("eagr", 2, 1, 2)


def test_unhashable_schedules_are_refused():
    @dataclass
    class Loose:
        lists: list = field(default_factory=list)
        name: str = "loose"
        default_chunks: int = 1

    with pytest.raises(StrategyError, match="make it a frozen dataclass"):
        plan(Loose(), 2, 1, 2)  # type: ignore[arg-type]


def test_schedules_of_other_distributions(monkeypatch):
    from simtrain.core import catalog

    theirs = Mine((GOOD, GOOD), name="theirs")
    monkeypatch.setattr(catalog, "names", lambda group: ("theirs",) if group == "schedules" else ())
    monkeypatch.setattr(catalog, "find", lambda group, name: theirs)
    assert "theirs" in names()
    assert find("theirs") is theirs


def test_plans_are_shared_and_cannot_be_written():
    laid_out = plan("1f1b", 2, 1, 4)
    assert plan("1F1B", 2, 0, 4) is laid_out
    with pytest.raises(ValueError, match="read-only"):
        laid_out.action[0] = Action.BACKWARD
