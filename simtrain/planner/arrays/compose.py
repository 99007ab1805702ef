"""Step time and memory of many strategies at once, from the tables of layers and stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import precision
from simtrain.core.program import IntArray
from simtrain.planner.arrays.holding import FEATURES, GROUPS, groups, moments
from simtrain.planner.arrays.layers import PASSES, ROLES
from simtrain.planner.arrays.paths import WIDTH, Part, find_paths, projected_micro_batches, walk
from simtrain.planner.arrays.stages import Division
from simtrain.planner.arrays.tables import Tables
from simtrain.planner.space import Block
from simtrain.step.occupancy import KINDS
from simtrain.step.schedules import plan

SCHEDULES = ("1f1b", "interleaved")
CHECKPOINTS = ("none", "full", "selective")

COVERED = frozenset(
    {
        *("data", "micro_batch", "accumulation", "precision", "optimizer", "checkpoint", "zero", "tensor", "sequence_parallel"),
        *("pipeline", "schedule", "chunks", "context", "context_style"),
    }
)
"""Fields of a strategy that may differ from their defaults."""

WIRE_SIZES = (2.0**10, 2.0**18, 2.0**22, 2.0**26, 2.0**30)
"""Messages by whose times groups are told apart."""

REPEATS = 2
"""Times that overlaps of reductions and passes are found anew."""

ROUNDS = 3
"""Micro-batches per stage after which memory no longer grows with their number."""


@dataclass(frozen=True, slots=True, eq=False)
class Estimates:
    """Step time and memory of the candidates of a block.

    Attributes:
        covered: Whether the arrays know a candidate; the rest is zero or false otherwise.
        sure: Whether times are close. They are rough (25 % off at worst) where hosts hold up their devices, and where gathers of full
            sharding hold up a pipeline.
        step_time_s: Period of the steady state.
        device_bytes: What the fullest device needs.
        energy_j: Energy of all devices and hosts in a step.
        kinds_bytes: What its allocator holds at its peak, by `MemoryKind`; shape (candidates, kinds).
    """

    covered: np.ndarray
    sure: np.ndarray
    step_time_s: FloatArray
    device_bytes: FloatArray
    energy_j: FloatArray
    kinds_bytes: np.ndarray


def estimate_block(tables: Tables, block: Block) -> Estimates:
    """Step time, memory and energy of all candidates of a block that the tables cover.

    Args:
        tables: Shared by the blocks of a search.
        block: Candidates with the same runtime and degrees.

    Raises:
        StrategyError: The model does not divide so.
        UnsupportedError: It is not modelled.
    """
    known = tables.covers(block)
    covered, sure = np.zeros(len(block), dtype=bool), np.zeros(len(block), dtype=bool)
    if known:
        covered = (
            _allowed(block.checkpoints, CHECKPOINTS)[block.codes[:, 2]]
            & _allowed([s for s, _ in block.schedules], SCHEDULES)[block.codes[:, 5]]
        )
        covered &= tables.runs(block)
        if block.runtime.reduce_every:
            covered &= np.array(block.zeros)[block.codes[:, 3]] != 2
    times, device, energy = np.zeros(len(block)), np.zeros(len(block)), np.zeros(len(block))
    kinds = np.zeros((len(block), len(KINDS)), dtype=np.float32)
    if covered.any():
        part = _Part(tables, block, np.flatnonzero(covered))
        times[covered], device[covered], energy[covered], kinds[covered] = part.evaluate()
        sure[covered] = part.sure & ~part.lags
    return Estimates(covered, sure, times, device, energy, kinds)


def _exposed(q: FloatArray, tails: FloatArray) -> FloatArray:
    """How long after its last backward pass each stage has its gradients reduced (`StageRow.tails`)."""
    backward = q[:, Part.BACKWARD] + q[:, Part.LAST]
    before = q[:, Part.BACKWARD_BEFORE] + q[:, Part.LAST_BEFORE]
    left = tails[..., 0] - tails[..., 1] * backward[:, None, None] - tails[..., 2] * before[:, None, None]
    return np.asarray(left.max(axis=2))


def _passes(parts: FloatArray) -> FloatArray:
    """Both passes of a block, of what stands before the blocks and behind them; shape (candidates, 3)."""
    return parts[:, Part.FORWARD : Part.FORWARD + 3] + parts[:, Part.BACKWARD : Part.BACKWARD + 3]


def _allowed(values: Sequence[Any], known: Sequence[Any]) -> np.ndarray:
    return np.array([v in known for v in values], dtype=bool)


class _Part:
    """The covered candidates of a block."""

    def __init__(self, tables: Tables, block: Block, chosen: IntArray) -> None:
        self.tables, self.block = tables, block
        self.codes = block.codes[chosen]
        self.sure = np.ones(len(chosen), dtype=bool)
        self.lags = np.zeros(len(chosen), dtype=bool)
        self.stages = block.degrees["pipeline"]
        self._price()

    def _price(self) -> None:
        block, tables, codes = self.block, self.tables, self.codes
        sample = block.strategy_of([0] * 6)
        self.divisions: dict[tuple[int, int, int], Division] = {}
        schedules = np.unique(codes[:, 5]).tolist()
        splits = np.unique(codes[:, 4]).tolist()
        for r, v, s in product(range(len(block.precisions)), schedules, splits):
            schedule, chunk = block.schedules[v]
            plain = sample.with_(precision=block.precisions[r], schedule=schedule, chunks=chunk, micro_batch=1, accumulation=self.stages)
            plain = plain.with_(zero=0, checkpoint="none", sequence_parallel=block.splits[s])
            self.divisions[r, v, s] = tables.division(plain, block.runtime)
        self.lengths = tuple(sorted({n for d in self.divisions.values() for n in d.counts}))
        wire = tables.wire(sample)
        used = [np.unique(codes[:, i]).tolist() for i in range(6)]
        self.used = used
        shape = tuple(len(a) for a in (block.micro_batches, block.precisions, block.checkpoints, block.splits))
        self.device = np.zeros((*shape, WIDTH))
        self.host = np.zeros((*shape, WIDTH))
        self.copies = np.zeros((*shape, 3))
        self.crossing = np.zeros(shape)
        memory = (2, len(ROLES), len(PASSES), len(self.lengths), len(KINDS))
        self.peaks, self.nets = np.zeros((*shape, *memory)), np.zeros((*shape, *memory))
        for key in np.unique(codes[:, [0, 1, 2, 4]], axis=0).tolist():
            m, r, c, s = key
            strategy = block.strategy_of([m, r, c, 0, s, 0]).with_(schedule="1f1b", chunks=0, accumulation=1, zero=0)
            row = tables.layer(strategy, block.runtime, wire)
            at = (m, r, c, s)
            self.device[at], self.host[at], self.copies[at], self.crossing[at] = row.device_s, row.host_s, row.copies_s, row.crossing_bytes
            for z in {int(block.zeros[i] == 3) for i in used[3]}:
                held = strategy.with_(zero=3 * z)
                self.peaks[(*at, z)], self.nets[(*at, z)] = tables.memory(held, block.runtime, wire, self.lengths)
        self.rows = {(*key, z): tables.stage(division, block.zeros[z]) for key, division in self.divisions.items() for z in used[3]}

    def _division(self, schedule: int) -> Division:
        """Any division with a schedule: precision and sequence do not decide what its stages hold."""
        return next(d for (_, v, _), d in self.divisions.items() if v == schedule)

    def _gather(self, name: str) -> FloatArray:
        """A field of the rows of stages, for every candidate."""
        block = self.block
        sample = np.asarray(getattr(next(iter(self.rows.values())), name))
        table = np.zeros((len(block.precisions), len(block.schedules), len(block.splits), len(block.zeros), *sample.shape))
        for key, row in self.rows.items():
            table[key] = getattr(row, name)
        return np.asarray(table[tuple(self.codes[:, i] for i in (1, 5, 4, 3))])

    def evaluate(self) -> tuple[FloatArray, FloatArray, FloatArray, np.ndarray]:
        """Step times, bytes on the device, energies, bytes by kind."""
        quantities, host = self._quantities()
        times, device = np.zeros(len(self.codes)), np.zeros(len(self.codes))
        kinds = np.zeros((len(self.codes), len(KINDS)), dtype=np.float32)
        fixed = self._gather("fixed_bytes") + self._gather("sample_bytes") * self._samples()[:, None, None]
        update, outside = self._gather("update_bytes"), self._gather("outside_bytes")
        for (v, *steps), rows in self._alike([projected_micro_batches(self.stages, a) for _, a in self.block.micro_batches]):
            times[rows] = self._times(rows, quantities[rows], host[rows], v, (steps[0], steps[1]))
        for (v, count), rows in self._alike([(min(a, ROUNDS * self.stages),) for _, a in self.block.micro_batches]):
            device[rows], kinds[rows] = self._memory(rows, v, count, fixed[rows], update[rows])
        runtime = self.block.runtime
        return times, device * runtime.reserved_factor + outside, self._energy(times, quantities), kinds

    def _alike(self, of_batch: Sequence[tuple[int, ...]]) -> list[tuple[list[int], IntArray]]:
        """Candidates with the same schedule and the same of what is given for every micro-batch, with both."""
        keys = np.concatenate([self.codes[:, 5:], np.array(of_batch)[self.codes[:, 0]]], axis=1)
        distinct, group = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(group.ravel()))[:-1])
        return list(zip(distinct.tolist(), parts, strict=True))

    @property
    def _accumulation(self) -> IntArray:
        return np.array([a for _, a in self.block.micro_batches], dtype=np.int64)[self.codes[:, 0]]

    def _energy(self, times: FloatArray, quantities: FloatArray) -> FloatArray:
        """Energy of a step, each device as busy as the mean of all stages (`simtrain.cost.energy`)."""
        cluster, degrees = self.tables.cluster, self.block.degrees
        ranks = int(np.prod([degrees[n] for n in ("data", "tensor", "pipeline", "context")]))
        device, blocks = cluster.devices[0], self.tables.pattern.blocks if self.tables.pattern else 0
        passes = quantities[:, Part.FORWARD : Part.FORWARD + 3] + quantities[:, Part.BACKWARD : Part.BACKWARD + 3]
        work = passes @ np.array([blocks, 1.0, 1.0])
        busy = np.minimum(self._accumulation * work / self.stages + self._gather("update_s").mean(axis=1), times)
        hosts = -(-ranks // len(cluster.nodes[0].devices)) * cluster.host_power_w * times
        return np.asarray(ranks * (device.idle_power_w * times + (device.power_w - device.idle_power_w) * busy) + hosts)

    def _samples(self) -> FloatArray:
        return np.array([mb for mb, _ in self.block.micro_batches], dtype=np.float64)[self.codes[:, 0]]

    @property
    def _reduces(self) -> bool:
        return bool(self.block.degrees["data"] * self.block.degrees["context"] > 1)

    def _quantities(self) -> tuple[FloatArray, FloatArray]:
        """Seconds of every `Part` on the device, and on the host."""
        runtime, codes = self.block.runtime, self.codes
        at = tuple(codes[:, i] for i in (0, 1, 2, 4))
        q, host = self.device[at], self.host[at]
        zeros = np.array(self.block.zeros)[codes[:, 3]]
        if self._reduces and not runtime.main_gradients:
            q[:, Part.LAST : Part.LAST + 3] += self.copies[at] * (zeros < 2)[:, None]
        tails, reduced, blocks = self._gather("tails"), self._gather("reduced_s"), self._gather("blocks")
        inner = min(1, blocks.shape[1] - 1)
        alone = q[:, Part.LAST].copy()
        exposed = _exposed(q, tails)
        chunks = np.array([len(self._division(v).order.placement[0]) if v in self.used[5] else 1 for v in range(len(self.block.schedules))])
        held = chunks[codes[:, 5]]
        for _ in range(REPEATS):  # reductions slow the passes that hide them: a chunk's own last one first, then those of other chunks
            met = np.maximum(reduced - exposed, 0.0)
            each = blocks[:, inner] / held
            within = np.minimum(met[:, inner] / held, each * (q[:, Part.BACKWARD] + alone))
            q[:, Part.LAST] = alone + runtime.communication_share * within / each
            exposed = _exposed(q, tails)
        exposed += runtime.communication_share * np.maximum(met - (within * held)[:, None], 0.0)
        ends = [0, inner, blocks.shape[1] - 1]
        exposed[:, [0, -1]] += self._gather("tied_s")[:, None]
        q[:, Part.TAIL_FIRST : Part.TAIL_LAST + 1] = exposed[:, ends]
        start = self._gather("start_s")
        if np.any(zeros == 3):
            self._shard(q, exposed, start, zeros == 3)
            q[:, Part.TAIL_FIRST : Part.TAIL_LAST + 1] = exposed[:, ends]
        q[:, Part.START_FIRST : Part.START_LAST + 1] = start[:, ends]
        send = self._gather("send_s")
        crossing = self.crossing[at]
        q[:, Part.SEND_INSIDE] = send[:, 0] + send[:, 2] * crossing
        q[:, Part.SEND_ACROSS] = send[:, 1] + send[:, 3] * crossing
        return q, host

    def _shard(self, q: FloatArray, exposed: FloatArray, start: FloatArray, chosen: np.ndarray) -> None:
        """Adds what gathers and scatters of full sharding take beyond what passes hide (`simtrain.step.fully_sharded`).

        They go in order on one stream, one layer ahead. A block's pass takes at least as long as what moves beside it. Between two
        micro-batches what is no block is scattered and gathered anew, and the first block after it.
        """
        share = self.block.runtime.communication_share
        moved = np.where(chosen[:, None, None], self._gather("moved_s"), 0.0)
        gather, scatter = moved[:, 0, 0], moved[:, 0, 1]
        forward, backward = q[:, Part.FORWARD].copy(), q[:, Part.BACKWARD].copy()
        if self.stages > 1:  # how far what moves lags behind the passes differs from one micro-batch to the next
            self.lags = (gather > forward) | (gather + scatter > backward)
        q[:, Part.FORWARD] = np.maximum(forward + share * np.minimum(gather, forward), gather)
        both = gather + scatter
        q[:, Part.BACKWARD] = np.maximum(backward + share * np.minimum(both, backward), both)
        rest_gather, rest_scatter = moved[:, 0, 2], moved[:, 0, 3]
        embed, back = q[:, Part.FORWARD_BEFORE], q[:, Part.BACKWARD_BEFORE]
        between = np.maximum(back, scatter + rest_gather) + np.maximum(embed, rest_scatter + gather) - back - embed
        begins = rest_gather + np.maximum(embed, gather) - embed
        q[:, Part.BACKWARD_BEFORE] += np.where(chosen, between, 0.0)
        q[:, Part.LAST_BEFORE] -= np.where(chosen, between, 0.0)
        # the first stage ends with what stands before the blocks and begins with it, others with blocks
        exposed[chosen] += moved[chosen, :, 1]
        exposed[:, 0] += np.where(chosen, np.maximum(scatter - back, 0.0) - scatter + rest_scatter, 0.0)
        start[chosen] += moved[chosen, :, 0]
        start[:, 0] += np.where(chosen, begins - gather, 0.0)

    def _times(self, rows: IntArray, quantities: FloatArray, host: FloatArray, v: int, steps: tuple[int, int]) -> FloatArray:
        """Step times of candidates with one schedule, projected from the same shorter steps."""
        accumulation = self._accumulation[rows]
        found = self._longest(quantities, v, accumulation, steps)
        division = self._division(v)
        counts = np.array([sum(division.counts[p] for p in held) for held in division.order.placement])
        own, issued = _passes(quantities), _passes(host)
        if self.stages == 1:
            whole = np.array([counts[0], 1.0, 1.0])
            self.sure[rows] = issued @ whole <= own @ whole
            return np.asarray(np.maximum(found, accumulation * (issued @ whole)))
        middle = counts[1:-1].max() if self.stages > 2 else 0
        shares = np.array([[counts[0], 1.0, 0.0], [middle, 0.0, 0.0], [counts[-1], 0.0, 1.0]]).T
        found = np.maximum(found, accumulation * (issued @ shares).max(axis=1))
        slow = np.flatnonzero((issued @ shares > own @ shares).any(axis=1))
        self.sure[rows[slow]] = False
        if len(slow):  # where hosts are slower than devices, what they may be ahead is all that helps
            paced = quantities[slow].copy()
            stage = np.maximum(own[slow] @ shares, issued[slow] @ shares)
            block = np.maximum(own[slow, 0], issued[slow, 0])
            ends = np.stack([stage[:, 0] - counts[0] * block, stage[:, 2] - counts[-1] * block], axis=1)
            scale = np.stack([block / own[slow, 0], *(ends / own[slow, 1:]).T], axis=1)
            paced[:, : Part.FIRST] *= np.tile(scale, 2)
            found[slow] = np.maximum(found[slow], self._longest(paced, v, accumulation[slow], steps) - self._ahead(rows[slow]))
        return np.asarray(found)

    def _ahead(self, rows: IntArray) -> FloatArray:
        """How far a host may be ahead of its device when a step begins: not at all where it waits for the loss scale."""
        runtime = self.block.runtime
        waits = np.array([precision(name).loss_scaling for name in self.block.precisions])[self.codes[rows, 1]]
        return np.where(waits, 0.0, runtime.run_ahead_launches * runtime.launch_s)

    def _longest(self, quantities: FloatArray, v: int, accumulation: IntArray, steps: tuple[int, int]) -> FloatArray:
        """The longest path with so many micro-batches, projected from shorter steps where they are many."""
        short, longer = steps
        found = np.asarray((quantities @ self._paths(v, short, quantities).T).max(axis=1))
        if short == longer:
            return found
        other = (quantities @ self._paths(v, longer, quantities).T).max(axis=1)
        return np.asarray(found + (other - found) * ((accumulation - short) / (longer - short)))

    def _paths(self, v: int, micro_batches: int, quantities: FloatArray) -> FloatArray:
        schedule, chunks = self.block.schedules[v]
        division = self._division(v)
        key = (schedule, chunks, self.stages, micro_batches, division.counts, division.per_node)
        if self.stages == 1:
            key = (*key[:3], micro_batches, division.counts, 1)
        if key not in self.tables.paths:
            name = schedule if self.stages > 1 else "1f1b"
            order = plan(name, self.stages, chunks if self.stages > 1 else 1, micro_batches)
            graph = walk(order, division.counts, division.per_node, self.block.runtime.blocking_sends)
            self.tables.paths[key] = find_paths(graph, quantities)
        return self.tables.paths[key]

    def _memory(self, rows: IntArray, v: int, count: int, fixed: FloatArray, update: FloatArray) -> tuple[FloatArray, np.ndarray]:
        """Allocated bytes of the fullest stage, and by kind."""
        block = self.block
        division = self._division(v)
        schedule, chunks = block.schedules[v]
        order = plan(
            schedule if self.stages > 1 else "1f1b",
            self.stages,
            chunks if self.stages > 1 else 1,
            count,
        )
        zeros = np.array(block.zeros)[self.codes[rows, 3]]
        at = (*(self.codes[rows, i] for i in (0, 1, 2, 4)), (zeros == 3).astype(np.int64))
        runtime = block.runtime
        always = np.full(len(rows), runtime.main_gradients or (runtime.gradient_as_bucket_view and self._reduces)) | (zeros == 2)
        best = np.full(len(rows), -np.inf)
        kinds = np.zeros((len(rows), len(KINDS)))
        for i, stage in enumerate(division.stages):
            group = groups(order, stage, division.counts)
            features = self._features(division, stage, group, at, always)
            counts = moments(order, stage, division.counts)
            fullest = (features.sum(axis=2) @ counts.T).argmax(axis=1)
            peak = fixed[:, i] + np.einsum("nf,nfk->nk", counts[fullest], features)
            updating = fixed[:, i] + update[:, i] + features[:, [GROUPS + g for g in group]].sum(axis=1)
            for rows_of in (peak, updating):
                total = rows_of.sum(axis=1)
                more = total > best
                best[more] = total[more]
                kinds[more] = rows_of[more]
        return best, kinds

    def _features(self, division: Division, stage: int, group: list[int], at: tuple[IntArray, ...], always: np.ndarray) -> FloatArray:
        """What `holding.moments` counts, by kind; shape (candidates, `FEATURES`, kinds)."""
        held = division.order.placement[stage]
        last = division.order.positions - 1
        features = np.zeros((len(at[0]), FEATURES, len(KINDS)))
        for g in set(group):
            own = held[group.index(g)]
            role = 3 if last == 0 else 1 if g else 0 if own == 0 else 2
            length = self.lengths.index(division.counts[own])
            peaks, nets = (memory[:, :, :, :, :, role, :, length][at] for memory in (self.peaks, self.nets))
            features[:, g] = nets[:, 0]
            features[:, GROUPS + g] = np.where(always[:, None], 0.0, nets[:, 0] + nets[:, 2])
            own_peaks = 2 * GROUPS + 3 * g
            features[:, own_peaks : own_peaks + 3] = peaks
            features[always, own_peaks + 2] = peaks[always, 1]
        return features
