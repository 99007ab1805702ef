"""Screening as arrays: estimates everything that the tables cover and keeps what may be best, as candidates in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.core.hardware import Cluster
from simtrain.core.polynomial import FloatArray
from simtrain.core.workload import Workload
from simtrain.planner.arrays.compose import LOOSE, Estimates, estimate_block
from simtrain.planner.arrays.tables import Tables
from simtrain.planner.failures import over_text, refusal
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


Timed = tuple[float, Candidate]
"""Seconds per sample, and whose."""


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
        pool: What fits as screened, for what takes the place of finalists that do not fit after all.
    """

    finalists: list[Timed]
    failed: list[tuple[Candidate, Failure]]
    unlisted: int
    passed_over: int
    rest: tuple[Candidate, ...]
    known: int
    skipped: tuple[Block, ...]
    pool: Pool


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
    pool = Pool(every, tuple(blocks), tuple(objectives), limits, ~over)
    finalists, close = pool.take()
    large = every.where(over)
    tick(int((~sure).sum()) - len(close))
    nearest = large.where(np.argsort(large.memory, kind="stable")[:LISTED])
    failed += _too_large(nearest, blocks, read.largest, capacity)
    return Screened(
        finalists=finalists,
        failed=failed,
        unlisted=len(large.block) - len(nearest.block),
        passed_over=int((~over).sum()) - len(close) - len(finalists),
        rest=(*rest, *close),
        known=len(every.block) - len(close),
        skipped=skipped,
        pool=pool,
    )


@dataclass(slots=True)
class Pool:
    """What fits as screened, of which those are taken that may be best.

    What a finalist really needs is known when it is read: where that is too much, others take its place.

    Attributes:
        every: What the tables cover.
        blocks: The space.
        objectives: What is asked for.
        limits: What must be kept to.
        fitting: Which of them fit, as far as is known.
        taken: Which of them were handed out, and where they stand.
    """

    every: _Columns
    blocks: tuple[Block, ...]
    objectives: tuple[str, ...]
    limits: Limits
    fitting: np.ndarray
    taken: dict[Candidate, int] = field(default_factory=dict)

    def take(self, lost: Iterable[Candidate] = ()) -> tuple[list[Timed], list[Candidate]]:
        """What may be best and was not taken yet: with seconds per sample, and what must be read to know them.

        Args:
            lost: What was looked at since and does not fit; the rest is compared without it.
        """
        self.fitting[[self.taken[c] for c in lost if c in self.taken]] = False
        every, carried = self.every, np.array([block.runtime.name for block in self.blocks])[self.every.block]
        sure, timed = every.within <= LOOSE, all(o in TIMED for o in self.objectives)
        close = self.fitting & ~sure & _may_be_fastest(every, self.fitting, carried)
        rated = np.flatnonzero(self.fitting & ~close & (sure | (not timed)))  # of the rough, memory is known all the same
        chosen = rated[_best(every.where(rated), carried[rated], self.objectives, self.limits)]
        known = set(self.taken.values())
        finalists = [(float(every.seconds[row]), self._candidate(row)) for row in chosen.tolist() if row not in known]
        return finalists, [self._candidate(row) for row in np.flatnonzero(close).tolist() if row not in known]

    def left(self, runtime: str) -> int:
        """How many of a runtime fit as screened and were not taken."""
        own = np.array([block.runtime.name == runtime for block in self.blocks], dtype=bool)[self.every.block]
        own[list(self.taken.values())] = False
        return int((own & self.fitting).sum())

    def _candidate(self, row: int) -> Candidate:
        candidate = self.blocks[int(self.every.block[row])].candidate(int(self.every.index[row]))
        self.taken[candidate] = row
        return candidate


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
        reason = f"out of memory by {over_text(memory - capacity, candidate.runtime)}"
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
