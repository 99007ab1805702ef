"""Keep, recompute or move: what becomes of each layer's activations for the least added time within a memory budget.

Beside keeping a layer or recomputing it on its own, what it saves, or the input that recomputation needs, may go over the host link and
come back. A copy adds time only where it is longer than what runs meanwhile: out of the device, until the next layer that moves has run
forward; back, while that layer and those between run backward (`simtrain.step.offload_activations`). So copies of layers far apart are
free, those of neighbours add up, and the link's time is a resource as memory is. The choice is a mixed-integer program, exact for plans of
this form, solved by HiGHS through `scipy.optimize.milp`, with its dual bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.core.polynomial import FloatArray
from simtrain.step.remat_milp import INFEASIBLE, LinearProgram
from simtrain.step.remat_plan import Chain
from simtrain.step.remat_search import inside_of

GAP = 1e-4
"""Relative gap at which the solver stops."""


class Choice(IntEnum):
    """What becomes of a layer's activations."""

    KEEP = 0
    RECOMPUTE = 1
    MOVE = 2
    MOVE_INPUT = 3


@dataclass(frozen=True, slots=True, eq=False)
class MovableChain:
    """A chain whose layers may also move what they hold.

    Attributes:
        chain: The layers; nothing may wait for the loss (`Chain.until_loss_bytes`) beyond what is held anyway.
        forward_s: Forward time of each layer.
        backward_s: Backward time of each layer.
        movable: Whether it may move; never the last layer.
        saved_bytes: What leaves the device where a kept layer moves.
        input_bytes: The same of a recomputed layer.
        out_s: Time to copy what a kept layer saves to the host; `back_s` from it.
        back_s: See `out_s`.
        input_out_s: Time to copy what a recomputed layer needs to the host; `input_back_s` from it.
        input_back_s: See `input_out_s`.
    """

    chain: Chain
    forward_s: FloatArray
    backward_s: FloatArray
    movable: NDArray[np.bool_]
    saved_bytes: FloatArray
    input_bytes: FloatArray
    out_s: FloatArray
    back_s: FloatArray
    input_out_s: FloatArray
    input_back_s: FloatArray

    def __len__(self) -> int:
        return len(self.chain)

    def allowed(self) -> NDArray[np.bool_]:
        """Choices of each layer, shape (layers, choices)."""
        recomputable = self.chain.recomputable
        columns = [np.ones(len(self), dtype=np.bool_), recomputable, self.movable, recomputable & self.movable]
        return np.stack(columns, axis=1)

    def taken(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """By layer and choice: bytes held to the end of forward, most bytes meanwhile, bytes on the way, seconds out and back."""
        inside, n = inside_of(self.chain), len(self)
        own = np.arange(n)
        hold, peak = np.where(np.isfinite(inside.hold), inside.hold, 0.0), inside.peak[own, own + 1]
        none = np.zeros(n)
        held = np.stack([inside.kept_hold, hold, inside.kept_hold - self.saved_bytes, hold - self.input_bytes], axis=1)
        most = np.stack([inside.kept_peak, peak, inside.kept_peak, peak], axis=1)
        moving = np.stack([none, none, self.saved_bytes, self.input_bytes], axis=1)
        out = np.stack([none, none, self.out_s, self.input_out_s], axis=1)
        back = np.stack([none, none, self.back_s, self.input_back_s], axis=1)
        return held, np.where(np.isfinite(most), most, 0.0), moving, out, back


@dataclass(frozen=True, slots=True)
class MovePlan:
    """What becomes of each layer.

    Attributes:
        choices: In forward order.
        added_s: Time of recomputation, and of waiting for copies.
        peak_bytes: Most that is held at once.
        bound_s: No plan of this form within the budget adds less.
    """

    choices: tuple[Choice, ...]
    added_s: float
    peak_bytes: float
    bound_s: float


def replay(moves: MovableChain, choices: Sequence[Choice]) -> tuple[float, float]:
    """Carries choices out, layer by layer, and returns the time they add and the most bytes that are held."""
    held, most, moving, out, back = (a.tolist() for a in moves.taken())
    again = [float(moves.chain.last_s[i]) if c in (Choice.RECOMPUTE, Choice.MOVE_INPUT) else 0.0 for i, c in enumerate(choices)]
    leaving = [i for i, c in enumerate(choices) if c in (Choice.MOVE, Choice.MOVE_INPUT)]
    behind = {i: (leaving[k + 1] if k + 1 < len(leaving) else i + 1) for k, i in enumerate(leaving)}
    added, peak, base, under_way = sum(again), 0.0, 0.0, 0.0
    for i, choice in enumerate(choices):
        peak = max(peak, base + under_way + most[i][choice])
        base += held[i][choice]
        if i in behind.values():
            under_way = 0.0
        if i in behind:
            under_way = moving[i][choice]
    for i, until in behind.items():
        window = range(i + 1, until + 1)
        added += max(out[i][choices[i]] - sum(float(moves.forward_s[k]) for k in window), 0.0)
        added += max(back[i][choices[i]] - sum(float(moves.backward_s[k]) + again[k] for k in window), 0.0)
    return added, peak


def best_moves(moves: MovableChain, budget_bytes: float, *, time_limit_s: float = 20.0) -> MovePlan:
    """Finds the choices that add least time within a budget.

    Args:
        moves: The layers.
        budget_bytes: What may be held at once.
        time_limit_s: After so long the best plan so far is returned, with its bound.

    Raises:
        StrategyError: No plan fits; the message says what the smallest takes.
        UnsupportedError: No plan was found in time.
    """
    found = _solve(moves, budget_bytes, time_limit_s, smallest=False)
    if found is None:
        least = least_moved_bytes(moves, time_limit_s=time_limit_s)
        raise StrategyError(
            f"no choice of layers to keep, recompute or move fits {budget_bytes / 2**30:.3f} GiB; the smallest takes "
            f"{least / 2**30:.3f} GiB: give more memory, or choose a smaller micro-batch"
        )
    choices, bound_s = found
    added_s, peak = replay(moves, choices)
    return MovePlan(choices, added_s, peak, min(max(bound_s, 0.0), added_s))


def least_moved_bytes(moves: MovableChain, *, time_limit_s: float = 20.0) -> float:
    """The smallest budget that some choice fits.

    Raises:
        UnsupportedError: It was not found in time.
    """
    found = _solve(moves, np.inf, time_limit_s, smallest=True)
    if found is None:
        raise UnsupportedError("the smallest choice of layers to keep, recompute or move was not found")
    return replay(moves, found[0])[1]


def _solve(moves: MovableChain, budget_bytes: float, time_limit_s: float, *, smallest: bool) -> tuple[tuple[Choice, ...], float] | None:
    """The solver's choices and bound; nothing if none fits."""
    from scipy.optimize import Bounds, milp

    n = len(moves)
    held, most, moving, out, back = moves.taken()
    unit_bytes = float(most.max()) if smallest else budget_bytes
    unit_s = float(moves.forward_s.sum()) or 1.0
    program = LinearProgram()
    pick = program.variables(n, len(Choice))
    binary = program.count
    later, last, before, way = (program.variables(n + 1) for _ in range(4))
    budget = program.variables(1)
    stalls = []
    _ones(program, pick, later, last)
    _memory(program, pick, (before, way, last), (held / unit_bytes, most / unit_bytes, moving / unit_bytes), int(budget[0]))
    again = moves.chain.last_s / unit_s
    for windows, copies, longer in ((moves.forward_s, out, np.zeros(n)), (moves.backward_s, back, again)):
        stalls.append(_link(program, pick, last, windows / unit_s, copies / unit_s, longer))
    low, high = np.zeros(program.count), np.full(program.count, np.inf)
    high[pick] = moves.allowed()
    high[later] = high[last] = 1.0
    low[before] = -np.inf
    high[before[0]] = high[later[n - 1 :]] = low[before[0]] = 0.0
    if not smallest:
        low[budget] = high[budget] = 1.0
    cost = np.zeros(program.count)
    if smallest:
        cost[budget] = 1.0
    else:
        cost[np.concatenate(stalls)] = 1.0
        cost[pick[:, [Choice.RECOMPUTE, Choice.MOVE_INPUT]]] = again[:, None]
    integral = np.zeros(program.count, dtype=np.int64)
    integral[:binary] = 1
    answer = milp(
        cost,
        integrality=integral,
        bounds=Bounds(low, high),
        constraints=program.constraints(),
        options={"time_limit": time_limit_s, "mip_rel_gap": GAP},
    )
    if answer.status == INFEASIBLE:
        return None
    if answer.x is None:
        raise UnsupportedError(f"no choice of layers to keep, recompute or move was found within {time_limit_s:g} s")
    choices = tuple(Choice(int(k)) for k in np.argmax(answer.x[pick], axis=1))
    return choices, float(answer.mip_dual_bound) * unit_s


def _moved(pick: NDArray[np.int64], layer: int, factor: float = 1.0) -> list[tuple[int, float]]:
    return [(int(pick[layer, c]), factor) for c in (Choice.MOVE, Choice.MOVE_INPUT)]


def _ones(program: LinearProgram, pick: NDArray[np.int64], later: NDArray[np.int64], last: NDArray[np.int64]) -> None:
    """One choice per layer; `later[i]` says whether a layer behind i moves, `last[i]` whether layer i - 1 is the last that does."""
    n = len(pick)
    for i in range(n):
        program.add([(int(pick[i, c]), 1.0) for c in Choice], 1, 1)
    for i in range(n - 1):
        program.add([(later[i], 1.0), (later[i + 1], -1.0)], 0, np.inf)
        program.add([(later[i], 1.0), *_moved(pick, i + 1, -1.0)], 0, np.inf)
        program.add([(later[i], 1.0), (later[i + 1], -1.0), *_moved(pick, i + 1, -1.0)], -np.inf, 0)
        program.add([(last[i + 1], 1.0), *_moved(pick, i, -1.0), (later[i], 1.0)], 0, np.inf)
        program.add([(last[i + 1], 1.0), *_moved(pick, i, -1.0)], -np.inf, 0)
        program.add([(last[i + 1], 1.0), (later[i], 1.0)], -np.inf, 1)


def _memory(
    program: LinearProgram,
    pick: NDArray[np.int64],
    names: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    sizes: tuple[FloatArray, FloatArray, FloatArray],
    budget: int,
) -> None:
    """Books what is held before each layer and what is on its way while it runs, forward and backward alike."""
    before, way, last = names
    held, most, moving = sizes
    n, longest = len(pick), float(moving.max())
    for i in range(n):
        carried = [(int(pick[i, c]), -float(held[i, c])) for c in Choice]
        program.add([(before[i + 1], 1.0), (before[i], -1.0), *carried], 0, 0)
        own = [(int(pick[i, c]), -float(moving[i, c])) for c in Choice]
        program.add([(way[i], 1.0), *own], 0, np.inf)
        beside = [(way[i - 1], 1.0)] if i else []
        program.add([(before[i], 1.0), *beside, *((int(pick[i, c]), float(most[i, c])) for c in Choice), (budget, -1.0)], -np.inf, 0)
        if i:
            ends = [*_moved(pick, i, longest), (int(last[i]), longest)]
            program.add([(way[i], 1.0), (way[i - 1], -1.0), *ends], 0, np.inf)


def _link(
    program: LinearProgram,
    pick: NDArray[np.int64],
    last: NDArray[np.int64],
    windows_s: FloatArray,
    copies_s: FloatArray,
    longer_s: FloatArray,
) -> NDArray[np.int64]:
    """Books what is left of a copy behind each layer, and the wait where the next begins; returns the waits.

    Args:
        program: Added to.
        pick: Choices.
        last: Whether the layer before is the last that moves.
        windows_s: Time of each layer.
        copies_s: Time of each choice's copy.
        longer_s: What recomputation adds to the time of a layer.
    """
    n, longest = len(pick), float(copies_s.max())
    open_, left, stall = program.variables(n), program.variables(n), program.variables(n)
    for i in range(n):
        program.add([(open_[i], 1.0), *((int(pick[i, c]), -float(copies_s[i, c])) for c in Choice)], 0, np.inf)
        if not i:
            continue
        more = [(int(pick[i, c]), float(longer_s[i])) for c in (Choice.RECOMPUTE, Choice.MOVE_INPUT)]
        program.add([(left[i], 1.0), (open_[i - 1], -1.0), *more], -float(windows_s[i]), np.inf)
        program.add([(stall[i], 1.0), (left[i], -1.0), *_moved(pick, i, -longest), (int(last[i]), -longest)], -longest, np.inf)
        program.add([(open_[i], 1.0), (left[i], -1.0), (stall[i], 1.0)], 0, np.inf)
    return stall


__all__ = ["Choice", "MovableChain", "MovePlan", "best_moves", "least_moved_bytes", "replay"]
