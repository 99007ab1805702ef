"""Lowering: from a checked setting to the program of a step.

Every rank class works off its instructions; what crosses to another stage is sent, gradients are reduced as they become ready
(`simtrain.step.synchronise`), then the optimizer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from simtrain.core.program import IntArray, Program, TermKind
from simtrain.core.workload import Workload
from simtrain.step.builder import Builder
from simtrain.step.costs import TERM_KINDS, PassCost, chain
from simtrain.step.fully_sharded import FullySharded
from simtrain.step.instructions import Step, chunk_costs
from simtrain.step.layout import Lane, Layout, lay_out
from simtrain.step.occupancy import Mode
from simtrain.step.passes import Pass
from simtrain.step.schedules import Action
from simtrain.step.setting import Setting
from simtrain.step.synchronise import Replicated, Synchroniser


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """A program and what it was made from.

    Attributes:
        layout: Who does what.
        program: Terms for `schedule` and `simulate`.
        pass_terms: For each lane, the compute term of each pass in execution order, the optimizer last.
    """

    layout: Layout
    program: Program
    pass_terms: tuple[IntArray, ...]


def lower(setting: Setting, *, split: bool = False) -> Lowered:
    """Builds the program of a step.

    Args:
        setting: The checked question.
        split: Give the ranks of every replica a class of their own.
    """
    return _Lowering(lay_out(setting, split=split)).run()


class _Lowering:
    """One pass over the instructions of all stages, in an order in which everything that is waited for comes first."""

    def __init__(self, layout: Layout) -> None:
        setting = layout.setting
        self.layout = layout
        self.build = Builder(setting.runtime, layout.classes, setting.precision.loss_scaling)
        sharded = setting.strategy.zero == 3 and layout.grid.holders > 1
        self.sync: Synchroniser = FullySharded(layout, self.build) if sharded else Replicated(layout, self.build)
        self.costs = {(lane.index, c): chunk_costs(setting, lane, chunk) for lane in layout.lanes for c, chunk in enumerate(lane.chunks)}
        self.coarse = layout.grid.pipeline > 1 and not self.sync.gathers
        self.steps: list[list[int]] = [[] for _ in layout.lanes]
        self.arrivals: dict[tuple[int, int], list[int]] = {}
        self.held: dict[int, list[int]] = {}
        self.known: dict[tuple[int, int, tuple[int, int]], tuple[str, TermKind, PassCost]] = {}

    def run(self) -> Lowered:
        layout, plan = self.layout, self.layout.plan
        targets = _targets(layout)
        done: dict[tuple[int, int], int] = {}
        for i in range(len(plan)):
            lanes = layout.by_stage[plan.rank[i]]
            terms = self._instruction(i, lanes)
            for lane, term in zip(lanes, terms, strict=True):
                done[i, lane.kind] = term
            for target in targets[i]:
                self._send(i, target, lanes, terms)
        updates = self.sync.finish([terms[-1] for terms in self.steps])
        program = self.build.finish()
        return Lowered(layout, program, tuple(np.array([*t, u], dtype=np.int64) for t, u in zip(self.steps, updates, strict=True)))

    def _instruction(self, i: int, lanes: Sequence[Lane]) -> list[int]:
        """Adds the passes of an instruction on every kind of replica; returns the last term on each."""
        plan = self.layout.plan
        action, chunk, micro_batch = Action(int(plan.action[i])), int(plan.chunk[i]), int(plan.micro_batch[i])
        steps = [self.costs[lane.index, chunk].steps(action, micro_batch, plan, lane.stage, chunk) for lane in lanes]
        cuts = self._cuts(steps[0], lanes[0], chunk)
        terms: list[int] = []
        for start, end in pairwise(cuts):
            part = steps[0][start:end]
            gathered = self.sync.before(lanes, chunk, part, micro_batch)
            terms = [self._piece(i, lane, whole, (start, end), gathered) for lane, whole in zip(lanes, steps, strict=True)]
            self.sync.after(lanes, chunk, part, terms, micro_batch)
        return terms

    def _cuts(self, steps: Sequence[Step], lane: Lane, chunk: int) -> list[int]:
        """Where an instruction is cut into terms: at every pass, or only where gradients are reduced meanwhile."""
        if not self.coarse:
            return list(range(len(steps) + 1))
        if not steps[0].last:
            return [0, len(steps)]
        ready = self.sync.ready_after(lane, chunk)
        inner = [k + 1 for k, s in enumerate(steps) if s.ends_gradients and s.which.layer in ready]
        return sorted({0, *inner, len(steps)})

    def _piece(self, i: int, lane: Lane, whole: Sequence[Step], part: tuple[int, int], gathered: Sequence[int]) -> int:
        micro_batch = int(self.layout.plan.micro_batch[i])
        waits = [*self.arrivals.pop((i, lane.kind), ()), *self.held.pop(lane.index, ()), *gathered]
        key = (lane.index, id(whole), part)
        if key not in self.known:  # instructions are listed once, and their costs keep the lists
            steps = whole[slice(*part)]
            cost = steps[0].cost if len(steps) == 1 else chain([s.cost for s in steps])
            label = _label(lane, int(self.layout.plan.chunk[i]), steps, self.coarse)
            self.known[key] = (label, TERM_KINDS[steps[-1].which.mode], cost)
        label, kind, cost = self.known[key]
        term = self.build.work(lane.index, kind, label, cost, micro_batch, waits)
        self.steps[lane.index] += [term] * (part[1] - part[0])
        return term

    def _send(self, i: int, target: int, lanes: Sequence[Lane], terms: Sequence[int]) -> None:
        """Sends what another stage waits for; on the same stage it is there already."""
        layout, plan = self.layout, self.layout.plan
        source, to = int(plan.rank[i]), int(plan.rank[target])
        for lane, term in zip(lanes, terms, strict=True):
            if source == to:
                continue
            forward = bool(plan.action[i] == Action.FORWARD)
            cost = layout.send(lane, int(plan.chunk[i]), to, forward=forward)
            stream = self.build.stream((lane.index,), "send forward" if forward else "send backward")
            label = f"send to stage {to}"
            sent = self.build.transfer(TermKind.SEND, stream, label, cost, [term], int(plan.micro_batch[i]))
            self.arrivals.setdefault((target, lane.kind), []).append(sent)
            if layout.setting.runtime.blocking_sends:
                self.held.setdefault(lane.index, []).append(sent)


def _targets(layout: Layout) -> list[list[int]]:
    """Instructions on other stages that wait for each instruction."""
    plan = layout.plan
    pointer, predecessor = plan.gates
    waiting: list[list[int]] = [[] for _ in range(len(plan))]
    owner = np.repeat(np.arange(len(plan)), np.diff(pointer))
    across = plan.rank[owner] != plan.rank[predecessor]
    for target, source in zip(owner[across].tolist(), predecessor[across].tolist(), strict=True):
        waiting[source].append(target)
    return waiting


def _label(lane: Lane, chunk: int, steps: Sequence[Step], coarse: bool) -> str:
    held = lane.chunks[chunk]
    first = steps[0].which
    if not coarse:
        return pass_label(held.workload, first, held.start)
    name = "forward" if first.mode in (Mode.FORWARD, Mode.FORWARD_DROPPING) else steps[-1].which.mode.value.split(",")[0]
    return f"{name} chunk {held.position}" if len(lane.chunks) > 1 else name


def pass_label(workload: Workload, step: Pass, start: int = 0) -> str:
    """What a pass is called in timelines."""
    layer = workload.layers[step.kind]
    position = f".{start + step.layer - sum(x.repeats for x in workload.layers[: step.kind])}" if layer.repeats > 1 else ""
    name = {Mode.FORWARD_DROPPING: "forward", Mode.BACKWARD_ACCUMULATING: "backward"}.get(step.mode, step.mode.value)
    return f"{name} {layer.name}{position}"


__all__ = ["Lowered", "lower", "pass_label"]
