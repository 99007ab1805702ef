"""`estimate`: the same costs as `schedule`, composed in closed form.

The device runs passes in order: pass i cannot start before it is ready, so the end of pass j is
`C[j+1] + max(0, max over i <= j of (ready[i] - C[i]))` with C the running sum of durations. Three chains have this form: passes waiting
for the host to issue them, buckets waiting for the passes that fill them, copies waiting for reduced buckets. Without a synchronisation
the host runs ahead across steps, and the period is the larger of what the host needs and what the device needs.

A pipeline's passes are composed chunk by chunk, each as long as its host or its device needs, in the order of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.result import Result
from simtrain.core.workload import Collective
from simtrain.step.breakdown import PARTS
from simtrain.step.costs import PassCost, chain, pass_cost
from simtrain.step.instructions import ChunkCosts, Step, chunk_costs
from simtrain.step.kernels import bucket_copy_kernels
from simtrain.step.layout import Lane, Layout, lay_out
from simtrain.step.network import cost, place, send
from simtrain.step.results import assemble, by_rank, memory_report
from simtrain.step.schedules import Action
from simtrain.step.schedules.evaluate import timeline
from simtrain.step.setting import Setting
from simtrain.step.synchronise import chunk_buckets, reduction, update_cost

NOTE = "closed form: hosts and devices are composed per step, transients between steps are left out"


def in_order(ready_s: FloatArray, durations_s: FloatArray, start_s: float = 0.0) -> FloatArray:
    """Ends of jobs that run one after the other, none before it is ready: `end[j] = max(end[j-1], ready[j]) + t[j]`."""
    before = np.concatenate([[0.0], np.cumsum(durations_s)])
    latest = np.maximum.accumulate(np.maximum(ready_s - before[:-1], start_s))
    return np.asarray(before[1:] + latest, dtype=np.float64)


def estimate_setting(setting: Setting) -> Result:
    """Predicts a step in closed form."""
    layout = lay_out(setting)
    sharded = setting.strategy.zero == 3 and layout.grid.holders > 1
    if layout.grid.pipeline > 1 or sharded:
        return _Chunked(layout, sharded=sharded).result()
    return _single_stage(layout)


@dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """A lane's step, flattened.

    Attributes:
        passes: Cost of each pass of all micro-batches.
        ends: End of each pass.
        free: When the device becomes free for the first pass: after the optimizer and the gather, if the host had to wait.
        copy_back: Cost of copying each bucket back.
        update: Cost of the optimizer.
        cells: Index of the pass that completes each bucket.
    """

    passes: tuple[PassCost, ...]
    ends: FloatArray
    free: float
    copy_back: tuple[PassCost, ...]
    update: PassCost
    cells: tuple[int, ...]

    @property
    def host_s(self) -> float:
        """Time the host needs to issue the whole step."""
        return sum(c.host_s for c in (*self.passes, *self.copy_back, self.update))


def _single_stage(layout: Layout) -> Result:
    setting = layout.setting
    buckets = chunk_buckets(layout, 0, 0)
    synchronised = setting.precision.loss_scaling and setting.runtime.run_ahead_launches > 0
    by_size = {(b.size_bytes, id(p)): reduction(layout, p, b.size_bytes).time_s for b, p in buckets}
    reductions = np.array([by_size[b.size_bytes, id(p)] for b, p in buckets])
    gather_s = _gather_s(layout, 0)
    chains = [_chain(layout, lane, synchronised, gather_s) for lane in layout.lanes]
    reduced = _reduced(setting, chains, reductions)
    periods = [_period(chain, reduced, gather_s, synchronised) for chain in chains]
    slowest = int(np.argmax(periods))
    parts = _breakdown(chains[slowest], periods[slowest], reduced, gather_s)
    busy = [_busy_s(chain) for chain in chains]
    streams = {"compute": busy[slowest], "communication": float(reductions.sum()) + gather_s}
    if setting.runtime.run_ahead_launches > 0:
        streams["host"] = chains[slowest].host_s
    ranks = by_rank(layout.classes, busy)
    return assemble(layout, "estimate", periods[slowest], parts, streams, memory_report(layout), notes=(NOTE,), busy_by_rank=ranks)


def _gather_s(layout: Layout, stage: int) -> float:
    """What gathering updated parameters adds to a step."""
    setting = layout.setting
    if setting.strategy.zero not in (1, 2) or layout.grid.holders == 1:
        return 0.0
    placed = place(layout.fabric, layout.grid.holder_groups(stage, setting.strategy.shard))
    size = setting.precision.parameter.size_bytes
    held = layout.by_stage[stage][0].chunks
    if setting.runtime.overlap_gather:  # only what the first layer needs stands in the way
        first = next((x.parameter_count for x in held[0].workload if x.parameter_count), 0)
        return cost(layout.fabric, Collective.ALL_GATHER, placed, first * size).time_s
    total = sum(p.elements for chunk in held for p in chunk.parameters)
    return cost(layout.fabric, Collective.ALL_GATHER, placed, total * size).time_s


def _chain(layout: Layout, lane: Lane, synchronised: bool, gather_s: float) -> _Chain:
    setting, priced = layout.setting, chunk_costs(layout.setting, lane, lane.chunks[0])
    buckets = chunk_buckets(layout, 0, 0)
    steps: list[Step] = []
    for micro_batch in range(layout.plan.micro_batches):
        for action in (Action.FORWARD, Action.BACKWARD):
            steps += priced.steps(action, micro_batch, layout.plan, 0, 0)
    runtime = setting.runtime
    back = [pass_cost(lane.place.device, bucket_copy_kernels(b.gradients, setting.precision), runtime) for b, _ in buckets]
    copy_back = () if runtime.gradient_as_bucket_view or runtime.main_gradients else tuple(back)
    complete = {s.which.layer: i for i, s in enumerate(steps) if s.last and s.ends_gradients}
    cells = tuple(complete[b.ready_after_layer] for b, _ in buckets)
    passes, update = tuple(s.cost for s in steps), update_cost(setting, lane)
    device = np.array([c.device_s for c in passes])
    if not synchronised:
        return _Chain(passes, np.cumsum(device), 0.0, copy_back, update, cells)
    # the clock starts when the host resumes: it issues the optimizer, then the passes of the next step
    free = update.lead_s + update.device_s + gather_s
    ready = update.host_s + _issued(passes)
    return _Chain(passes, in_order(ready, device, free), free, copy_back, update, cells)


def _issued(passes: tuple[PassCost, ...]) -> FloatArray:
    """When each pass may start, counted from when the host begins with the first."""
    before = np.concatenate([[0.0], np.cumsum([c.host_s for c in passes])])[:-1]
    return np.asarray(before + np.array([c.lead_s for c in passes]), dtype=np.float64)


def _reduced(setting: Setting, chains: list[_Chain], durations_s: FloatArray) -> FloatArray:
    """When each bucket has been reduced."""
    if not len(durations_s):
        return np.zeros(0)
    overlap = setting.runtime.overlap_communication
    ready = np.max([[chain.ends[cell if overlap else -1] for cell in chain.cells] for chain in chains], axis=0)
    return in_order(ready, durations_s)


def _finish(chain: _Chain, reduced: FloatArray, synchronised: bool) -> float:
    """When gradients are where the optimizer wants them."""
    end = float(chain.ends[-1])
    if not len(reduced):
        return end
    if not chain.copy_back:
        return max(end, float(reduced[-1]))
    ready = np.maximum(reduced, end)
    if synchronised:
        before = chain.update.host_s + sum(c.host_s for c in chain.passes)
        ready = np.maximum(ready, before + _issued(chain.copy_back))
    return float(in_order(ready, np.array([c.device_s for c in chain.copy_back]))[-1])


def _period(chain: _Chain, reduced: FloatArray, gather_s: float, synchronised: bool) -> float:
    finish = _finish(chain, reduced, synchronised)
    if synchronised:
        # the host itself resumes only once it has issued everything up to the optimizer
        return max(finish, chain.host_s)
    return max(finish + chain.update.device_s + gather_s, chain.host_s)


def _busy_s(chain: _Chain) -> float:
    return sum(c.device_s for c in (*chain.passes, *chain.copy_back, chain.update))


def _breakdown(chain: _Chain, period_s: float, reduced: FloatArray, gather_s: float) -> dict[str, float]:
    parts = _work_parts(chain.passes)
    parts["optimizer"] = chain.update.device_s
    busy = sum(parts.values())
    exposed = _finish(chain, reduced, False) - float(chain.ends[-1]) if len(reduced) else 0.0
    within = max(min(exposed + gather_s, period_s - busy), 0.0)
    parts["communication"] += within
    parts["host"] = max(period_s - busy - within, 0.0)
    return parts


def _work_parts(passes: Sequence[PassCost]) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    parts["recompute"] = sum(c.recompute_s for c in passes)
    parts["communication"] = sum(c.wire_s for c in passes)
    parts["compute"] = sum(c.device_s for c in passes) - parts["recompute"] - parts["communication"]
    return parts


class _Chunked:
    """Chunks of a pipeline, or the gathered layers of ZeRO stage 3, each as long as what holds it up longest."""

    def __init__(self, layout: Layout, *, sharded: bool) -> None:
        self.layout, self.setting, self.sharded = layout, layout.setting, sharded
        self.costs = {
            (lane.index, c): chunk_costs(layout.setting, lane, chunk) for lane in layout.lanes for c, chunk in enumerate(lane.chunks)
        }

    def result(self) -> Result:
        layout, plan = self.layout, self.layout.plan
        kinds = sorted({lane.kind for lane in layout.lanes})
        ends = [self._kind_end(kind) for kind in kinds]
        slowest = kinds[int(np.argmax([e.max() for e in ends]))]
        end = float(max(e.max() for e in ends))
        after = [self._after(stage) for stage in range(plan.stages)]
        period = end + max(after)
        bound = max((lane for lane in layout.lanes if lane.kind == slowest), key=self._busy)
        parts = _work_parts(self._passes(bound))
        parts["optimizer"] = update_cost(self.setting, bound).device_s
        parts["communication"] += max(max(after) - parts["optimizer"], 0.0)
        rest = max(period - sum(parts.values()), 0.0)
        parts["bubble" if plan.stages > 1 else "communication"] += rest
        ranks = by_rank(layout.classes, [self._busy(lane) for lane in layout.lanes])
        streams = {"compute": self._busy(bound)}
        return assemble(layout, "estimate", period, parts, streams, memory_report(layout), notes=(NOTE,), busy_by_rank=ranks)

    def _passes(self, lane: Lane) -> list[PassCost]:
        plan, found = self.layout.plan, []
        for i in plan.of_rank(lane.stage).tolist():
            chunk = int(plan.chunk[i])
            steps = self.costs[lane.index, chunk].steps(Action(int(plan.action[i])), int(plan.micro_batch[i]), plan, lane.stage, chunk)
            found += [s.cost for s in steps]
        return found

    def _busy(self, lane: Lane) -> float:
        return sum(c.device_s for c in self._passes(lane)) + update_cost(self.setting, lane).device_s

    def _kind_end(self, kind: int) -> FloatArray:
        """When the instructions of one kind of replica end."""
        layout, plan = self.layout, self.layout.plan
        times = {action: np.zeros(plan.positions) for action in Action}
        for lanes in layout.by_stage:
            lane = next(x for x in lanes if x.kind == kind)
            for c, chunk in enumerate(lane.chunks):
                for action in self._actions():
                    times[action][chunk.position] = self._piece_s(self.costs[lane.index, c], lane, action)
        first, second = times[Action.INPUT_GRADIENT], times[Action.WEIGHT_GRADIENT]
        if not plan.split_backward:
            first = times[Action.BACKWARD]
        elif Action.BACKWARD in self._actions():
            second = np.maximum(second, times[Action.BACKWARD] - first)
        return timeline(plan, times[Action.FORWARD], first, second, self._transfer_s()).end_s

    def _actions(self) -> list[Action]:
        return [Action(int(a)) for a in np.unique(self.layout.plan.action)]

    def _piece_s(self, priced: ChunkCosts, lane: Lane, action: Action) -> float:
        steps = priced.listed(action, adding=self.layout.plan.micro_batches > 1 and action is not Action.FORWARD, last=False)
        whole = chain([s.cost for s in steps])
        if not self.sharded:
            return max(whole.device_s, whole.host_s)
        moved = 0.0
        placed = place(self.layout.fabric, self.layout.grid.holder_groups(lane.stage, self.setting.strategy.shard))
        precision = self.setting.precision
        size = min(precision.low.size_bytes, precision.parameter.size_bytes)
        counts = [x.parameter_count for x in priced.chunk.workload]
        for n in counts:
            if n and action is not Action.WEIGHT_GRADIENT:
                moved += cost(self.layout.fabric, Collective.ALL_GATHER, placed, n * size).time_s
            if n and action in (Action.BACKWARD, Action.WEIGHT_GRADIENT):
                width = 4 if self.setting.runtime.main_gradients else size
                moved += cost(self.layout.fabric, Collective.REDUCE_SCATTER, placed, n * width).time_s
        return max(whole.device_s, whole.host_s, moved)

    def _transfer_s(self) -> float:
        layout = self.layout
        if layout.grid.pipeline == 1:
            return 0.0
        edge = layout.lanes[0].chunks[0].concrete[-1].layer
        batch, sequence = self.setting.strategy.micro_batch, layout.local.sequence
        size = edge.cut(batch, sequence) * self.setting.precision.dtype(edge.cut_role).size_bytes
        return send(layout.fabric, layout.grid, 0, 1, size).time_s

    def _after(self, stage: int) -> float:
        """What follows the last pass of a stage: the reductions that are left, the update, the gather."""
        layout, setting = self.layout, self.setting
        update = max(update_cost(setting, lane).device_s for lane in layout.by_stage[stage])
        if self.sharded:
            return update
        left = 0.0
        for chunk in range(len(layout.by_stage[stage][0].chunks)):
            buckets = chunk_buckets(layout, stage, chunk)
            last = buckets[-1:] if setting.runtime.overlap_communication else buckets
            left += sum(reduction(layout, placed, bucket.size_bytes).time_s for bucket, placed in last)
        return left + update + _gather_s(layout, stage)
