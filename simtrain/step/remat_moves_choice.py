"""Carries out `checkpoint=optimal` beside `offload=activations`: which blocks are kept, recomputed or moved, as explicit blocks of both.

The budget is that of `simtrain.step.remat_choice`; where the memory ledger counts more than the choice did, it is made again with so much
less. Recomputation alone, whose segments may be longer, is taken where it adds no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from simtrain.core.checkpoint import budget_bytes
from simtrain.core.errors import StrategyError
from simtrain.core.offload import with_blocks
from simtrain.core.strategy import Strategy
from simtrain.core.units import format_bytes, format_time
from simtrain.cost.host import host_copy
from simtrain.step.layout import Lane, Layout, lay_out
from simtrain.step.ledger import ledger
from simtrain.step.offload_activations import movable_segments, saved_row
from simtrain.step.remat import segments
from simtrain.step.remat_choice import Question, layer_times
from simtrain.step.remat_moves import Choice, MovableChain, MovePlan, best_moves, least_moved_bytes
from simtrain.step.remat_plan import RematPlan, Span
from simtrain.step.setting import Setting

TRIES = 4
"""Times that a choice is made again with less."""

LIMIT_S = 8.0
"""Time that the solver may take for a choice."""


@dataclass(frozen=True, slots=True, eq=False)
class MoveQuestion:
    """A setting with what the choice needs to know.

    Attributes:
        plain: The same question without moving activations.
        moves: The layers.
        offload: What the strategy moves.
    """

    plain: Question
    moves: MovableChain
    offload: str

    @classmethod
    def of(cls, setting: Setting) -> MoveQuestion:
        """Prepares the choice for a setting that moves activations."""
        offload = setting.strategy.offload
        plain = Question.of(replace(setting, strategy=setting.strategy.with_(offload=with_blocks(offload, []))))
        layout = lay_out(plain.setting)
        lane = max(layout.lanes, key=lambda x: layer_times(x)[0].sum())
        return cls(plain, _movable_chain(plain, layout, lane, drives=setting.strategy.moved.activations == "nvme"), offload)

    def strategy(self, plan: MovePlan) -> Strategy:
        """A choice as a strategy says it."""
        again = [Span(i, i + 1, c in (Choice.RECOMPUTE, Choice.MOVE_INPUT)) for i, c in enumerate(plan.choices)]
        moved = [self.plain.blocks[i] for i, c in enumerate(plan.choices) if c in (Choice.MOVE, Choice.MOVE_INPUT)]
        return self.plain.setting.strategy.with_(checkpoint=self.plain.text(again), offload=with_blocks(self.offload, moved))

    def counted_bytes(self, strategy: Strategy) -> float:
        """The most that is allocated during a step, as the ledger counts it."""
        layout = lay_out(replace(self.plain.setting, strategy=strategy))
        return ledger(layout.setting, layout.lanes[0], layout.plan).peak_bytes

    def within(self, device_bytes: float) -> MovePlan | None:
        """The choice that adds least time on devices of so much memory; `None` if none was found."""
        limit = self.plain.allocated_bytes(device_bytes)
        budget = limit - self.plain.base_bytes
        for _ in range(TRIES):
            try:
                plan = best_moves(self.moves, budget, time_limit_s=LIMIT_S) if budget > 0 else None
            except StrategyError:
                return None
            if plan is None:
                return None
            over = self.counted_bytes(self.strategy(plan)) - limit
            if over <= 1e-9 * abs(limit):
                return plan
            budget = min(budget, plan.peak_bytes) - over
        return None

    def smallest(self) -> MovePlan:
        """The choice that takes the least memory."""
        return best_moves(self.moves, least_moved_bytes(self.moves, time_limit_s=LIMIT_S) * (1 + 1e-6), time_limit_s=LIMIT_S)


def _movable_chain(question: Question, layout: Layout, lane: Lane, *, drives: bool) -> MovableChain:
    chunk, setting = lane.chunks[0], question.setting
    forward_s, _, _, backward_s = layer_times(lane)
    depth = chunk.workload.depth
    movable, kept, recomputed = np.zeros(depth, dtype=np.bool_), np.zeros(depth), np.zeros(depth)
    full = {s.layers[0]: s for s in segments(chunk.workload, "full")}
    for segment in movable_segments(chunk, "none"):
        layer = segment.layers[0]
        movable[layer] = True
        kept[layer] = saved_row(setting, lane, segment).sum()
        recomputed[layer] = saved_row(setting, lane, full[layer]).sum() if full[layer].recomputed else 0.0

    def copies_s(sizes: np.ndarray, *, out: bool) -> np.ndarray:
        ranks = lane.rank_class.ranks
        return np.array([host_copy(layout.fabric, ranks, size, out=out, drives=drives).time_s if size else 0.0 for size in sizes.tolist()])

    return MovableChain(
        question.chain,
        forward_s,
        backward_s,
        movable,
        kept,
        recomputed,
        copies_s(kept, out=True),
        copies_s(kept, out=False),
        copies_s(recomputed, out=True),
        copies_s(recomputed, out=False),
    )


def settle_moves(setting: Setting) -> Setting:
    """Puts explicit blocks in place of an optimal choice between keeping, recomputing and moving.

    Where nothing fits the devices, the choice that takes least memory is predicted, and the result says that it does not fit.

    Raises:
        StrategyError: No choice fits a budget given by the user; the message names the smallest that one does.
    """
    asked, question = setting.strategy.checkpoint, MoveQuestion.of(setting)
    plain, given = question.plain, budget_bytes(asked)
    device_bytes = plain.capacity_bytes if given is None else min(given, plain.capacity_bytes)
    plan, alone = question.within(device_bytes), plain.within(device_bytes)
    lines: list[str] = []
    if plan is None and alone is None:
        plan = question.smallest()
        needed = plain.device_bytes(question.counted_bytes(question.strategy(plan)))
        if given is not None and given <= plain.capacity_bytes:
            raise StrategyError(
                f"checkpoint={asked} with offload={question.offload} is too little: the smallest choice of blocks to recompute or move "
                f"takes {needed / 2**30:.4g} GiB"
            )
        lines.append(f"no choice of blocks to recompute or move fits: the smallest takes {format_bytes(needed)}; it is what is predicted")
    if alone is not None and (plan is None or alone.added_s <= plan.added_s):
        chosen = plain.setting.strategy.with_(checkpoint=plain.text(alone.spans))
        lines.append(f"checkpoint={asked} with offload={question.offload} moves nothing: {_alone(alone)}")
    else:
        chosen = question.strategy(plan) if plan is not None else setting.strategy
        lines += [_described(question, plan, chosen, asked)] if plan is not None else []
    return replace(setting, strategy=chosen, notes=(*setting.notes, *lines))


def _alone(plan: RematPlan) -> str:
    blocks = sum(s.stop - s.start for s in plan.spans if s.recomputed)
    if not blocks:
        return "all fits as it is"
    return f"recomputing {blocks} blocks adds {format_time(plan.added_s)} to a micro-batch, and copies would add no less"


def _described(question: MoveQuestion, plan: MovePlan, chosen: Strategy, asked: str) -> str:
    again = sum(c in (Choice.RECOMPUTE, Choice.MOVE_INPUT) for c in plan.choices)
    moved = sum(c in (Choice.MOVE, Choice.MOVE_INPUT) for c in plan.choices)
    least = plan.added_s <= plan.bound_s * (1 + 1e-3)
    proven = "proven least" if least else f"at least {format_time(plan.bound_s)} is proven to be needed"
    return (
        f"checkpoint={asked} with offload={question.offload} recomputes {again} and moves {moved} of {max(question.plain.blocks) + 1} "
        f"blocks (checkpoint={chosen.checkpoint}, offload={chosen.offload}): recomputation and waiting add {format_time(plan.added_s)} to "
        f"the {format_time(question.plain.work_s)} of a micro-batch ({proven}, of plans that recompute block by block)"
    )


__all__ = ["MoveQuestion", "settle_moves"]
