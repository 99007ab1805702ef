"""Screening as arrays: estimates everything that the tables cover and keeps what may be best, as candidates in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.core.hardware import Cluster
from simtrain.core.polynomial import FloatArray
from simtrain.core.units import format_bytes
from simtrain.core.workload import Workload
from simtrain.planner.arrays.compose import LOOSE, Estimates, estimate_block
from simtrain.planner.arrays.tables import Tables
from simtrain.planner.failures import refusal
from simtrain.planner.found import Failure
from simtrain.planner.objectives import TIMED, Limits
from simtrain.planner.space import Block, Candidate
from simtrain.step.occupancy import KINDS

FINALISTS = 40
"""Candidates that are kept for each quality that an objective may ask for."""

OF_EACH = 5
"""Of the fastest of each runtime, how many are kept whatever others reach."""

LISTED = 1000
"""Candidates that are listed as too large for memory, those nearest to fitting."""

MEMORY_ERROR = 0.01
"""Share by which arrays may have too much memory: what is over by less is read in full."""


@dataclass(frozen=True, slots=True)
class Screened:
    """What screening as arrays left.

    Attributes:
        finalists: Seconds per sample and candidate, of those that may be best.
        failed: Those nearest to fitting among those that do not fit, and why.
        unlisted: How many more do not fit.
        passed_over: How many fit, but are not among the best.
        rest: Candidates that the tables do not cover.
        known: How many were estimated so that it decides.
        skipped: Blocks that time did not suffice for.
    """

    finalists: list[tuple[float, Candidate]]
    failed: list[tuple[Candidate, Failure]]
    unlisted: int
    passed_over: int
    rest: tuple[Candidate, ...]
    known: int
    skipped: tuple[Block, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Candidates of all blocks, side by side."""

    block: np.ndarray
    index: np.ndarray
    within: FloatArray
    seconds: FloatArray
    memory: FloatArray
    energy: FloatArray

    def where(self, chosen: np.ndarray) -> _Columns:
        return _Columns(*(getattr(self, name)[chosen] for name in self.__slots__))


def screen_blocks(
    workload: Workload,
    cluster: Cluster,
    blocks: Sequence[Block],
    objectives: Sequence[str],
    limits: Limits,
    tick: Callable[[int], None],
    late: Callable[[], bool],
) -> Screened:
    """Estimates every candidate that the tables cover.

    Args:
        workload: What is trained.
        cluster: On what.
        blocks: The space.
        objectives: What is asked for.
        limits: What must be kept to.
        tick: Told how many candidates are done.
        late: Whether to stop; what is left is neither among the rest nor counted.
    """
    capacity = min(d.memory.capacity_bytes for d in cluster.devices) * (1 - limits.memory_margin)
    read = _Read(capacity * (1 + MEMORY_ERROR))
    tables = Tables(workload, cluster)
    skipped: tuple[Block, ...] = ()
    for number, block in enumerate(blocks):
        if late():
            skipped = tuple(blocks[number:])
            break
        tick(read.take(tables, number, block))
    rest, failed, every = read.rest, read.failed, _joined(read.columns)
    over, sure = every.memory > read.most_bytes, every.within <= LOOSE
    carried = np.array([block.runtime.name for block in blocks])[every.block]
    close = ~over & ~sure & _may_be_fastest(every, ~over, carried)
    timed = all(o in TIMED for o in objectives)
    fitting = ~over & ~close & (sure | (not timed))  # of the rough, memory is known all the same
    large, fits = every.where(over), every.where(fitting)
    rest += [blocks[b].candidate(i) for b, i in zip(every.block[close].tolist(), every.index[close].tolist(), strict=True)]
    chosen = fits.where(_best(fits, carried[fitting], objectives, limits))
    tick(int((~sure & ~close).sum()))
    nearest = large.where(np.argsort(large.memory, kind="stable")[:LISTED])
    failed += _too_large(nearest, blocks, read.largest, capacity)
    return Screened(
        finalists=[
            (s, blocks[b].candidate(i))
            for s, b, i in zip(chosen.seconds.tolist(), chosen.block.tolist(), chosen.index.tolist(), strict=True)
        ],
        failed=failed,
        unlisted=len(large.block) - len(nearest.block),
        passed_over=int((~over & ~close).sum()) - len(chosen.block),
        rest=tuple(rest),
        known=len(every.block) - int(close.sum()),
        skipped=skipped,
    )


@dataclass(slots=True)
class _Read:
    """What the tables say of the blocks so far.

    Attributes:
        most_bytes: What a device may need so that the step time is asked for.
        columns: Of each block that they cover.
        largest: By block, the kind of memory that each candidate has most of.
        rest: Candidates that they do not cover.
        failed: Candidates that cannot be, and why.
    """

    most_bytes: float
    columns: list[_Columns] = field(default_factory=list)
    largest: dict[int, np.ndarray] = field(default_factory=dict)
    rest: list[Candidate] = field(default_factory=list)
    failed: list[tuple[Candidate, Failure]] = field(default_factory=list)

    def take(self, tables: Tables, number: int, block: Block) -> int:
        """Reads a block and returns how many of its candidates are done."""
        try:
            found = estimate_block(tables, block, self.most_bytes)
        except (StrategyError, UnsupportedError) as error:
            self.failed += [(block.candidate(i), refusal(block.candidate(i), str(error))) for i in range(len(block))]
            return len(block)
        self.rest += [block.candidate(i) for i in np.flatnonzero(~found.covered).tolist()]
        self.columns.append(_column(number, block, found))
        self.largest[number] = found.kinds_bytes.argmax(axis=1).astype(np.int8)
        return int((found.covered & (found.within <= LOOSE)).sum())


def _too_large(
    nearest: _Columns, blocks: Sequence[Block], largest: Mapping[int, np.ndarray], capacity: float
) -> Iterator[tuple[Candidate, Failure]]:
    """Candidates that do not fit, by how much, and what they have most of."""
    for b, i, memory in zip(nearest.block.tolist(), nearest.index.tolist(), nearest.memory.tolist(), strict=True):
        candidate = blocks[b].candidate(i)
        reason = f"out of memory by {format_bytes(memory - capacity)}"
        term = KINDS[int(largest[b][i])].value
        yield candidate, Failure(str(candidate.strategy), reason, memory - capacity, term, runtime=candidate.runtime.name)


def _column(number: int, block: Block, found: Estimates) -> _Columns:
    known = np.flatnonzero(found.covered)
    batch = np.array([n * a for n, a in block.micro_batches])[block.codes[known, 0]] * block.degrees["data"]
    return _Columns(
        np.full(len(known), number),
        known,
        found.within[known],
        found.step_time_s[known] / batch,
        found.device_bytes[known],
        found.energy_j[known] / batch,
    )


def _joined(columns: Sequence[_Columns]) -> _Columns:
    empty = _Columns(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0))
    every = [empty, *columns]
    return _Columns(*(np.concatenate([getattr(c, name) for c in every]) for name in _Columns.__slots__))


def _may_be_fastest(every: _Columns, fitting: np.ndarray, carried: np.ndarray) -> np.ndarray:
    """Which candidates can be the fastest that fits of their runtime, given how far off their times may be."""
    found = np.zeros(len(fitting), dtype=bool)
    slowest, fastest = every.seconds * (1 + every.within), every.seconds * (1 - every.within)
    for name in np.unique(carried):
        own = carried == name
        found[own] = fastest[own] <= slowest[own & fitting].min(initial=np.inf)
    return found


def _best(fits: _Columns, carried: np.ndarray, objectives: Sequence[str], limits: Limits) -> np.ndarray:
    """Indices of the candidates that may be best, the fastest first."""
    qualities = [fits.seconds]
    if limits.power_w or any(o not in TIMED for o in objectives):
        # one quality alone, and two at a time: what is fastest within every tenth of the memory or the energy that others need
        qualities += [fits.memory, fits.energy]
    kept = {i for quality in qualities for i in np.argsort(quality, kind="stable")[:FINALISTS].tolist()}
    for name in np.unique(carried):
        own = np.flatnonzero(carried == name)
        kept |= set(own[np.argsort(fits.seconds[own], kind="stable")[:OF_EACH]].tolist())
    for quality in qualities[1:]:
        order = np.argsort(fits.seconds, kind="stable")
        lowest = np.minimum.accumulate(quality[order]) if len(order) else quality
        kept |= set(order[np.flatnonzero(np.diff(lowest, prepend=np.inf) < 0)].tolist()[:FINALISTS])
    return np.array(sorted(kept, key=lambda i: fits.seconds[i]), dtype=np.int64)
