"""Screening: a lower bound of the step time that costs next to nothing, and memory without time, so that few are read in full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from simtrain.core.checkpoint import is_optimal
from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.core.hardware import Cluster
from simtrain.core.result import MemoryReport, Result
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.planner.space import Candidate
from simtrain.step.adaptive import settle_precision
from simtrain.step.costs import chain
from simtrain.step.instructions import chunk_costs
from simtrain.step.layout import Layout, lay_out
from simtrain.step.ledger import ledger
from simtrain.step.occupancy import Mode
from simtrain.step.predict import estimate
from simtrain.step.remat_choice import settle
from simtrain.step.results import lane_report, memory_report, tightest_lane
from simtrain.step.schedules import Action
from simtrain.step.setting import resolve

ALWAYS_HOLDING = ("gpipe", "breadth-first")
"""Schedules that hold more the more micro-batches there are; the others hold at most some multiple of the stages."""

ROUNDS = 3
"""Micro-batches per stage after which memory no longer grows with their number: interleaved schedules are full after two."""


HUNGER: dict[str, Mapping[Any, int]] = {
    "checkpoint": {"full": 0, "selective": 1, "none": 2},
    "zero": {3: 0, 2: 1, 1: 2, 0: 3},
    "schedule": {"1f1b": 0, "interleaved": 1},
}
"""Choices in the order in which they need more memory; what is not named here is not compared."""


class Reader(Protocol):
    """`estimate` or `schedule`."""

    def __call__(self, workload: Workload, cluster: Cluster, strategy: Strategy, *, runtime: Runtime) -> Result:
        """Predicts a step."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """What a micro-batch takes at least, all layers on one rank.

    Attributes:
        device_s: Of the device.
        host_s: Of the host.
        block_s: Of the device for one of the lightest blocks.
        tail_s: Of the device for what stands behind the last block.
        blocks: How many blocks there are.
    """

    device_s: float
    host_s: float
    block_s: float
    tail_s: float
    blocks: int


@dataclass(slots=True)
class Screen:
    """Bounds and memory of the candidates of one search; what they share is computed once.

    Attributes:
        workload: What is trained.
        cluster: On what.
        margin: Share of the device's memory that must stay free.
    """

    workload: Workload
    cluster: Cluster
    margin: float = 0.0
    _work: dict[Any, Work] = field(default_factory=dict)
    _memory: dict[Any, MemoryReport] = field(default_factory=dict)
    _too_large: dict[Any, list[tuple[tuple[int, ...], Candidate, MemoryReport]]] = field(default_factory=dict)

    def bound_s(self, candidate: Candidate) -> float:
        """A lower bound of the step time.

        Of the stages, the slowest takes at least their mean: `accumulation x (all layers' passes of a micro-batch) / pipeline`. The last
        stage has what stands behind the blocks, cannot begin before a micro-batch has come through the others, and its last gradient must
        go back through them. The
        collectives inside layers are those of a lone replica, which shares its links with nobody; reductions of gradients and the
        optimizer are left out, and so is recomputation of segments, which the cuts of a pipeline change.

        Raises:
            StrategyError: The model does not divide so.
            UnsupportedError: It is not modelled.
        """
        strategy, work = candidate.strategy, self._lone(candidate)
        least = work.device_s * strategy.accumulation / strategy.pipeline
        if candidate.runtime.host.run_ahead_launches:
            least = max(least, work.host_s * strategy.accumulation / strategy.pipeline)
        if strategy.pipeline == 1 or strategy.schedule not in HUNGER["schedule"]:
            return least
        chunks = max(strategy.chunks, 1)
        position_s = work.blocks // (strategy.pipeline * chunks) * work.block_s
        last_s = strategy.accumulation * (chunks * position_s + work.tail_s)
        return max(least, last_s + (strategy.pipeline - 1) * position_s)

    def _lone(self, candidate: Candidate) -> Work:
        strategy = candidate.strategy
        few = max(1, strategy.expert // strategy.context)
        changes: dict[str, Any] = {"data": few, "pipeline": 1, "accumulation": 1, "zero": 0, "shard": 0, "schedule": "1f1b", "chunks": 0}
        lone = strategy.with_(**changes)
        key = (lone, candidate.runtime)
        if key not in self._work:
            self._work[key] = self._price(lone, candidate.runtime)
        return self._work[key]

    def _price(self, lone: Strategy, runtime: Runtime) -> Work:
        # recomputation of chosen blocks is left out, so that none is chosen
        plain = lone.with_(checkpoint="none") if is_optimal(lone.checkpoint) else lone
        layout = lay_out(settle_precision(resolve(self.workload, self.cluster, plain, runtime)))
        lane = max(layout.lanes, key=lambda x: x.place.device.peak(layout.setting.precision.fastest))
        chunk = lane.chunks[0]
        costs = chunk_costs(layout.setting, lane, chunk)
        certain = lone.checkpoint in ("none", "selective", "full")
        steps = [
            s
            for action in (Action.FORWARD, Action.BACKWARD)
            for s in costs.listed(action, adding=False, last=False)
            if certain or s.which.mode is not Mode.RECOMPUTE
        ]
        total = chain([s.cost for s in steps])
        by_layer = [0.0] * chunk.workload.depth
        for step in steps:
            by_layer[step.which.layer] += step.cost.device_s
        blocks = [i for i in range(len(by_layer)) if chunk.is_block(i)]
        tail = by_layer[blocks[-1] + 1 :] if blocks else []
        return Work(total.device_s, total.host_s, min((by_layer[i] for i in blocks), default=0.0), sum(tail), len(blocks))

    def fits(self, memory: MemoryReport) -> bool:
        """Whether it fits and leaves the margin."""
        return memory.device_bytes <= memory.capacity_bytes * (1 - self.margin)

    def too_large(self, candidate: Candidate) -> tuple[Candidate, MemoryReport] | None:
        """A strategy that is known not to fit although it needs no more than this one, or this one itself; `None` if it fits.

        The hungriest choices come first in a search by time, so the least hungry relative is asked first: where that does not fit,
        nothing of the family does.

        Raises:
            StrategyError: The model does not divide so.
            UnsupportedError: It is not modelled.
        """
        for relative in dict.fromkeys((*self._relatives(candidate), candidate)):
            family, rank = _family(relative)
            known = self._too_large.setdefault(family, [])
            worse = next(((c, m) for r, c, m in known if all(a <= b for a, b in zip(r, rank, strict=True))), None)
            if worse:
                return worse
            memory = self.memory(relative)
            if not self.fits(memory):
                known.append((rank, relative, memory))
                return relative, memory
        return None

    def _relatives(self, candidate: Candidate) -> tuple[Candidate, Candidate]:
        strategy = candidate.strategy
        samples = strategy.micro_batch * strategy.accumulation
        saturated = strategy.accumulation >= strategy.pipeline and strategy.accumulation > 1 and self.workload.at_least == 1
        smaller = strategy.with_(micro_batch=1, accumulation=samples) if saturated else strategy
        if strategy.pipeline > 1 and strategy.schedule not in HUNGER["schedule"]:
            return candidate, candidate
        frugal = smaller.with_(schedule="1f1b", chunks=0)
        if strategy.zero == 0 and strategy.data * strategy.context > 1:
            frugal = frugal.with_(zero=1)
        if strategy.checkpoint in HUNGER["checkpoint"]:
            frugal = frugal.with_(checkpoint="full")
        return Candidate(frugal, candidate.runtime), Candidate(smaller, candidate.runtime)

    def memory(self, candidate: Candidate) -> MemoryReport:
        """Memory of the fullest device among those that may be: the first two stages and the last, with few micro-batches.

        Where the allocator's blocks are replayed, it is that of the tensors alone. What does not fit here does not fit; what fits here
        must still be read in full (`confirmed`).

        Raises:
            StrategyError: The model does not divide so.
            UnsupportedError: It is not modelled.
        """
        strategy = shortened(candidate.strategy)
        key = (strategy, candidate.runtime)
        if key not in self._memory:
            layout = self._layout(candidate)
            stages = sorted({0, min(1, layout.grid.pipeline - 1), layout.grid.pipeline - 1})
            chosen = replace(layout, lanes=tuple(layout.by_stage[s][0] for s in stages))
            books = [ledger(layout.setting, lane, layout.plan) for lane in chosen.lanes]
            own = lane_report(chosen, books, tightest_lane(chosen, books))
            reserved = own.allocated_bytes * candidate.runtime.memory.least_reserved_factor
            device = own.device_bytes - own.reserved_bytes + reserved
            self._memory[key] = replace(own, reserved_bytes=reserved, device_bytes=device, timeline=None)
        return self._memory[key]

    def confirmed(self, candidate: Candidate) -> MemoryReport:
        """Memory as readers have it of what fits as screened, the allocator's segments included: what fits here fits.

        Raises:
            StrategyError: The model does not divide so.
            UnsupportedError: It is not modelled.
        """
        screened = self.memory(candidate)
        return memory_report(self._layout(candidate)) if self.fits(screened) else screened

    def _layout(self, candidate: Candidate) -> Layout:
        """The candidate with as few micro-batches as have the same peak of memory, laid out over ranks."""
        return lay_out(settle(settle_precision(resolve(self.workload, self.cluster, shortened(candidate.strategy), candidate.runtime))))

    def projected_s(self, candidate: Candidate) -> float:
        """Step time as `estimate` has it, projected from shorter steps; at least the bound, as hosts may fall behind in longer ones alone.

        Raises:
            StrategyError: The model does not divide so.
            UnsupportedError: It is not modelled.
        """
        return max(projected_s(estimate, self.workload, self.cluster, candidate), self.bound_s(candidate))


def projected_s(reader: Reader, workload: Workload, cluster: Cluster, candidate: Candidate) -> float:
    """Step time from two shorter steps: once a pipeline is full, every further micro-batch adds the same.

    Where an optimal choice does not depend on it, what the allocator makes of the step is left out, which takes longer than its time.

    Raises:
        StrategyError: The model does not divide so.
        UnsupportedError: It is not modelled.
    """
    strategy, stages = candidate.strategy, candidate.strategy.pipeline
    few, more = 2 * stages, 3 * stages
    runtime = candidate.runtime
    if runtime.memory.replays_blocks and not is_optimal(strategy.checkpoint):
        runtime = runtime.with_(replays_blocks=False)
    if strategy.accumulation <= 4 * stages or strategy.schedule in ALWAYS_HOLDING:
        return reader(workload, cluster, strategy, runtime=runtime).step_time_s
    shorter, longer = (reader(workload, cluster, strategy.with_(accumulation=n), runtime=runtime).step_time_s for n in (few, more))
    return shorter + (longer - shorter) / (more - few) * (strategy.accumulation - few)


def _family(candidate: Candidate) -> tuple[Any, tuple[int, ...]]:
    """What strategies must have in common to be compared, and how hungry this one is in each respect."""
    strategy = candidate.strategy
    same: dict[str, Any] = {"micro_batch": 1, "accumulation": 1}
    rank = [strategy.micro_batch]
    for name, order in HUNGER.items():
        value = getattr(strategy, name)
        if value in order:
            same[name] = "none" if name == "checkpoint" else 0 if name == "zero" else "1f1b"
            rank.append(order[value])
        else:
            rank.append(0)
    if strategy.schedule in HUNGER["schedule"]:
        same["chunks"] = 0
        rank.append(strategy.chunks)
    saturated = strategy.accumulation >= strategy.pipeline and strategy.accumulation > 1
    return (strategy.with_(**same), candidate.runtime, saturated or strategy), tuple(rank)


def shortened(strategy: Strategy) -> Strategy:
    """The strategy with as few micro-batches as have the same peak of memory."""
    if strategy.schedule in ALWAYS_HOLDING:
        return strategy
    return strategy.with_(accumulation=min(strategy.accumulation, ROUNDS * strategy.pipeline))


REFUSALS = (StrategyError, UnsupportedError)
"""What a reader raises of a strategy that cannot be or is not modelled."""
