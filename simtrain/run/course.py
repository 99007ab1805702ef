"""From a target to stretches of equal steps: how many steps of which price, and what the loss does on the way.

Progress is counted in *effective tokens*, those a batch far below the noise scale would have needed. A step with `B` tokens makes
`B / (1 + B/B_noise)` of them (McCandlish et al. 2018); as the noise scale grows with falling loss, that is summed along the loss curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from simtrain.core.strategy import Strategy
from simtrain.run.batch_law import BatchLaw
from simtrain.run.checks import above_zero
from simtrain.run.loss_laws import LossLaw, NoiseGrowth
from simtrain.run.state_price import StatePrice

_GRID, _SMALLEST = 4000, 1e-7
_SHOWN = 200
GUESSING_LOSS = 11.0  # nats: even guesses over a vocabulary of 60,000 (assumption; it matters for the first steps only)
_ALMOST = 1e-9  # a step count this close to a whole number is that number


@dataclass(frozen=True, slots=True)
class Target:
    """When a run is done: exactly one of these.

    Attributes:
        loss: Nats per token, by a loss law.
        steps: Optimizer updates.
        tokens: Processed.
        samples: Processed.
        batch_law: A fitted law of steps against batch; the run makes `S(B)` steps.
    """

    loss: float | None = None
    steps: int | None = None
    tokens: float | None = None
    samples: float | None = None
    batch_law: BatchLaw | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"a target is exactly one of loss, steps, tokens, samples and batch_law; given: {', '.join(given) or 'none'}")
        if self.batch_law is None:
            above_zero(self, *given)

    def __str__(self) -> str:
        """Such as `loss 3.3`."""
        name = next(n for n in self.__dataclass_fields__ if getattr(self, n) is not None)
        value = getattr(self, name)
        return f"{name} {value:g}" if name != "batch_law" else f"{value.min_steps:g} (1 + {value.noise_scale:g}/batch) steps"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run with a batch, sequence length or strategy of its own (batch ramp, long context).

    One phase may have neither steps nor tokens: it is the rest until the target. If none has, the run's own strategy is the rest, last.

    Attributes:
        name: In words.
        steps: How long.
        tokens: How long, instead of steps.
        strategy: Its own; the run's if not given.
        seq_len: Its own; the workload's if not given.
        price: Of its steps, instead of a strategy.
    """

    name: str
    steps: int | None = None
    tokens: float | None = None
    strategy: Strategy | str | None = None
    seq_len: int | None = None
    price: StatePrice | None = None

    def __post_init__(self) -> None:
        above_zero(self, "steps", "tokens", "seq_len")
        if self.steps is not None and self.tokens is not None:
            raise InputError(f"phase {self.name!r} is given both steps and tokens: give one")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Evaluation between steps.

    Attributes:
        every_steps: How often.
        duration_s: How long training stands still for it.
    """

    every_steps: int
    duration_s: float

    def __post_init__(self) -> None:
        above_zero(self, "every_steps", "duration_s")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Equal steps in a row."""

    name: str
    steps: int
    price: StatePrice


@dataclass(frozen=True, slots=True)
class Course:
    """A run without disturbances.

    Attributes:
        stretches: In order.
        curve: Points (step, tokens, batch in samples, loss or NaN), at most a few hundred.
        overhead: Tokens processed over effective tokens: what the batch costs; 1 if no noise scale was used.
    """

    stretches: tuple[Stretch, ...]
    curve: tuple[tuple[float, float, float, float], ...]
    overhead: float = 1.0

    @property
    def steps(self) -> int:
        """All steps."""
        return sum(s.steps for s in self.stretches)

    @property
    def tokens(self) -> float:
        """All tokens."""
        return sum(s.steps * s.price.tokens_per_step for s in self.stretches)

    @property
    def time_s(self) -> float:
        """Time without disturbances."""
        return sum(s.steps * s.price.step_time_s for s in self.stretches)


@dataclass(frozen=True, slots=True)
class Learning:
    """What a loss needs.

    Attributes:
        law: Loss by parameters and tokens.
        parameters: The model's size.
        noise: How the noise scale grows; `None` takes batches to be far below it.
        efficiency: Tokens that bring as much, over tokens processed, where replicas exchange less than every step's gradients.
    """

    law: LossLaw
    parameters: float
    noise: NoiseGrowth | None
    efficiency: float = 1.0

    def needed(self, effective: FloatArray, batch_tokens: float) -> FloatArray:
        """Tokens to process per effective token, at each point."""
        if self.noise is None:
            return np.full_like(effective, 1 / self.efficiency)
        return (1 + batch_tokens / self.noise.tokens(self.loss(effective))) / self.efficiency

    def loss(self, effective: FloatArray) -> FloatArray:
        """Loss after effective tokens. Power laws have no upper end, but no training starts above guessing evenly over a vocabulary."""
        return np.minimum(self.law.loss(self.parameters, effective), GUESSING_LOSS)


def plan_course(parts: Sequence[tuple[Phase, StatePrice]], target: Target, learning: Learning | None) -> Course:
    """Turns phases and a target into stretches.

    Args:
        parts: Phases in order with the price of their steps; exactly one is open-ended.
        target: When it is done.
        learning: Needed for a loss; else only for the curve.

    Raises:
        InputError: The phases alone go beyond the target, the loss is out of reach, or there is no loss law.
    """
    rest = next(i for i, (phase, _) in enumerate(parts) if phase.steps is None and phase.tokens is None)
    steps = [_own_steps(phase, price) for phase, price in parts]
    missing = _missing_steps(parts, steps, rest, target, learning)
    if missing < 0:
        raise InputError(f"the phases alone go beyond the target ({target}): shorten them")
    steps[rest] = missing
    stretches = tuple(Stretch(phase.name, n, price) for (phase, price), n in zip(parts, steps, strict=True) if n > 0)
    if not stretches:
        raise InputError(f"the target ({target}) takes no step at all")
    curve, overhead = _curve(stretches, learning)
    return Course(stretches, curve, overhead)


def _own_steps(phase: Phase, price: StatePrice) -> int:
    if phase.steps is not None:
        return phase.steps
    return _whole(phase.tokens / price.tokens_per_step) if phase.tokens is not None else 0


def _whole(steps: float) -> int:
    return math.ceil(steps - max(_ALMOST, _ALMOST * steps))


def _missing_steps(
    parts: Sequence[tuple[Phase, StatePrice]], steps: list[int], rest: int, target: Target, learning: Learning | None
) -> int:
    price = parts[rest][1]
    others = [(n, p) for i, (n, (_, p)) in enumerate(zip(steps, parts, strict=True)) if i != rest]
    if target.steps is not None:
        return target.steps - sum(steps)
    if target.tokens is not None:
        return _or_negative((target.tokens - sum(n * p.tokens_per_step for n, p in others)) / price.tokens_per_step)
    if target.samples is not None:
        return _or_negative((target.samples - sum(n * p.samples_per_step for n, p in others)) / price.samples_per_step)
    if target.batch_law is not None:
        law = target.batch_law
        done = sum(n / law.steps(p.samples_per_step) for n, p in others)
        return _or_negative((1 - done) * law.steps(price.samples_per_step))
    if learning is None or target.loss is None:
        raise InputError("a loss as target needs a loss law and the number of parameters")
    return _steps_to_loss(parts, steps, rest, target.loss, learning)


def _or_negative(steps: float) -> int:
    return -1 if steps < -_ALMOST else _whole(max(steps, 0.0))


def effective_grid(end: float) -> FloatArray:
    """Returns effective tokens from a ten-millionth of the end up to it, evenly in their logarithm."""
    return np.concatenate([[end * _SMALLEST / 10], np.geomspace(end * _SMALLEST, end, _GRID)])


def _processed(learning: Learning, grid: FloatArray, batch_tokens: float) -> FloatArray:
    """Tokens processed from the start up to each point of effective tokens."""
    need = learning.needed(grid, batch_tokens)
    return np.concatenate([[grid[0] * need[0]], grid[0] * need[0] + np.cumsum(np.diff(grid) * (need[1:] + need[:-1]) / 2)])


def _steps_to_loss(parts: Sequence[tuple[Phase, StatePrice]], steps: list[int], rest: int, loss: float, learning: Learning) -> int:
    end = learning.law.tokens(learning.parameters, loss)
    grid = effective_grid(end)
    first, last = 0.0, end
    for n, (_, price) in zip(steps[:rest], parts[:rest], strict=True):
        first = _moved(learning, grid, price.tokens_per_step, first, n * price.tokens_per_step)
    for n, (_, price) in zip(reversed(steps[rest + 1 :]), reversed(parts[rest + 1 :]), strict=True):
        last = _moved(learning, grid, price.tokens_per_step, last, -n * price.tokens_per_step)
    if first > last:
        return -1
    batch_tokens = parts[rest][1].tokens_per_step
    processed = _processed(learning, grid, batch_tokens)
    return _whole(float(np.interp(last, grid, processed) - (np.interp(first, grid, processed) if first else 0.0)) / batch_tokens)


def _moved(learning: Learning, grid: FloatArray, batch_tokens: float, effective: float, tokens: float) -> float:
    """Effective tokens after processing more (or fewer) tokens with a batch; negative if there are not so many to take back."""
    processed = _processed(learning, grid, batch_tokens)
    now = float(np.interp(effective, grid, processed)) if effective else 0.0
    if now + tokens < 0:
        return -1.0
    beyond = now + tokens > processed[-1]
    return float(grid[-1]) * (1 + 1e-6) if beyond and tokens > 0 else float(np.interp(now + tokens, processed, grid))


def _curve(stretches: tuple[Stretch, ...], learning: Learning | None) -> tuple[tuple[tuple[float, float, float, float], ...], float]:
    tokens = sum(s.steps * s.price.tokens_per_step for s in stretches)
    total = sum(s.steps for s in stretches)
    effective, done_steps, done_tokens = 0.0, 0.0, 0.0
    points: list[tuple[float, float, float, float]] = []
    grid = effective_grid(tokens) if learning else np.array([tokens])
    for s in stretches:
        inside = np.unique(np.linspace(0, s.steps, max(2, round(_SHOWN * s.steps / total))))
        inside_tokens = inside * s.price.tokens_per_step
        losses = np.full(len(inside), math.nan)
        if learning is not None:
            processed = _processed(learning, grid, s.price.tokens_per_step)
            start = float(np.interp(effective, grid, processed)) if effective else 0.0
            reached = np.interp(start + inside_tokens, processed, grid)
            effective = float(reached[-1])
            losses = learning.loss(np.maximum(reached, grid[0]))
        rows = zip((done_steps + inside).tolist(), (done_tokens + inside_tokens).tolist(), losses.tolist(), strict=True)
        points += [(step, at, float(s.price.samples_per_step), loss) for step, at, loss in rows if step > 0]
        done_steps, done_tokens = done_steps + s.steps, done_tokens + float(inside_tokens[-1])
    spent = learning.efficiency if learning else 1.0
    return tuple(points), tokens * spent / effective if effective else 1.0
