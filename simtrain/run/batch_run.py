"""Plays a batch policy forward over a training whose noise scale grows, beside fixed batches.

Progress counts in steps without noise: a step of B samples goes 1 / (1 + noise scale / B) of one, and the target lies `noise_free_steps`
away (S_min). For a constant batch and noise scale this is S(B) = S_min (1 + noise scale / B).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from simtrain.run.batch_policy import BatchChoice, BatchPolicy, Price
from simtrain.run.learning_rate import LearningRate
from simtrain.run.noise_scale import NoiseScale

Noise = Callable[[float], float]
"""Noise scale in samples by progress, from 0 at the beginning to 1 at the target."""


@dataclass(frozen=True, slots=True)
class Training:
    """A training as the law sees it.

    Attributes:
        noise_free_steps: Steps to the target if gradients had no noise (S_min).
        noise_scale: In samples, by progress from 0 to 1.
        price: Seconds of a step by micro-batch and accumulation.
        kept_rate_batch: Batch whose best learning rate is kept whatever the batch; `None` if the rate follows the batch.
    """

    noise_free_steps: float
    noise_scale: Noise
    price: Price
    kept_rate_batch: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_free_steps) and self.noise_free_steps > 0):
            raise InputError(f"noise_free_steps is above zero, not {self.noise_free_steps!r}")

    def pace(self, noise: float, batch: float) -> float:
        """Steps without noise that one step of a batch is worth.

        With the best learning rate for the batch it is u = 1 / (1 + noise / batch). In the same quadratic model, whose gain at a rate of
        c times the noise-free one is 2c - c^2 / u, the rate u0 of another batch leaves u0 (2 - u0 / u): a larger batch then gains less
        than a factor of two, however large, and one half as large or less may lose.

        Raises:
            InputError: The kept rate is too high for so small a batch: nothing is gained.
        """
        own = 1 / (1 + noise / batch)
        if self.kept_rate_batch is None:
            return own
        kept = 1 / (1 + noise / self.kept_rate_batch)
        if kept >= 2 * own:
            raise InputError(
                f"at the learning rate of batch {self.kept_rate_batch} and a noise scale of {noise:.4g} samples, "
                f"steps of {batch:g} samples get nowhere: let the rate follow the batch"
            )
        return kept * (2 - kept / own)


@dataclass(frozen=True, slots=True)
class BatchRun:
    """How a training went: arrays with one entry for each stretch of equal steps.

    Attributes:
        time_s: When the stretch began.
        step: Steps before it.
        progress: From 0 to 1.
        batch: Samples per step.
        accumulation: Micro-batches per rank and step.
        learning_rate: What the base rate was multiplied by at its beginning (1 without a schedule).
        time_to_target_s: In all.
        steps: In all.
        samples: In all.
    """

    time_s: FloatArray
    step: FloatArray
    progress: FloatArray
    batch: FloatArray
    accumulation: FloatArray
    learning_rate: FloatArray
    time_to_target_s: float
    steps: float
    samples: float


def play(
    policy: BatchPolicy,
    training: Training,
    start: BatchChoice,
    *,
    learning_rate: LearningRate | None = None,
    measured_steps: int = 10,
    relative_error: float = 0.0,
    seed: int = 0,
) -> BatchRun:
    """Plays a policy forward to the target.

    Args:
        policy: What chooses.
        training: What is trained.
        start: The first batch, whose replicas all have.
        learning_rate: Schedule whose trajectory is told.
        measured_steps: Steps from one measurement of the noise scale to the next.
        relative_error: Standard error of the measured noise scale, log-normal and independent from one measurement to the next.
        seed: Of that error.

    Raises:
        InputError: A price or a noise scale that no training can have, or an error below zero.
    """
    if relative_error < 0 or measured_steps < 1:
        raise InputError(f"relative_error ({relative_error!r}) is 0 or more, measured_steps ({measured_steps!r}) 1 or more")
    rng, choice, since = np.random.default_rng(seed), start, policy.dwell_steps

    def decide(noise: float, steps: float) -> BatchChoice:
        nonlocal choice, since
        since += int(steps)
        seen = noise * math.exp(relative_error * rng.standard_normal()) if relative_error else noise
        chosen = policy.next(choice, NoiseScale(seen, seen / (1 + relative_error), seen * (1 + relative_error)), training.price, since)
        if chosen != choice:
            choice, since = chosen, 0
        return choice

    return _advance(training, decide, measured_steps, learning_rate)


def play_fixed(training: Training, choice: BatchChoice, *, learning_rate: LearningRate | None = None, stretches: int = 1000) -> BatchRun:
    """Plays one batch from beginning to end.

    Args:
        training: What is trained.
        choice: The batch.
        learning_rate: Schedule whose trajectory is told.
        stretches: Into how many the run is cut, about.
    """
    steps = training.noise_free_steps * (1 + _noise(training, 0.5) / choice.batch)
    return _advance(training, lambda _noise, _steps: choice, max(1, round(steps / stretches)), learning_rate)


def best_fixed(policy: BatchPolicy, training: Training, replicas: int = 1) -> tuple[BatchChoice, BatchRun]:
    """Returns the fixed batch that a sweep over all choices of a policy would find, and its run."""
    runs = ((choice, play_fixed(training, choice, stretches=200)) for choice in policy.choices(replicas))
    return min(runs, key=lambda pair: pair[1].time_to_target_s)


def _noise(training: Training, progress: float) -> float:
    noise = training.noise_scale(min(progress, 1.0))
    if not (math.isfinite(noise) and noise >= 0):
        raise InputError(f"the noise scale at progress {progress:.3g} is {noise!r}, not a number of samples from 0 up")
    return noise


def _advance(
    training: Training, decide: Callable[[float, float], BatchChoice], stretch_steps: int, learning_rate: LearningRate | None
) -> BatchRun:
    rows: list[tuple[float, ...]] = []
    time_s = steps = samples = progress = base_steps = last_steps = 0.0
    while progress < 1:
        noise = _noise(training, progress)
        choice = decide(noise, last_steps)
        batch, step_s = choice.batch, training.price(choice.micro_batch, choice.accumulation)
        if not (math.isfinite(step_s) and step_s > 0):
            raise InputError(f"a step of {choice} is priced at {step_s!r} s: give a price above zero")
        rate = learning_rate.factor(base_steps, batch, noise) if learning_rate else 1.0
        rows.append((time_s, steps, progress, batch, choice.accumulation, rate))
        first = stretch_steps / training.noise_free_steps * training.pace(noise, batch)
        middle = _noise(training, progress + first / 2)  # midpoint rule: the noise scale moves within a stretch
        gone = stretch_steps / training.noise_free_steps * training.pace(middle, batch)
        last_steps = stretch_steps * min(1.0, (1 - progress) / gone)
        progress = progress + gone if gone < 1 - progress else 1.0
        time_s, steps, samples = time_s + last_steps * step_s, steps + last_steps, samples + last_steps * batch
        if learning_rate:
            base_steps += last_steps * learning_rate.advance(batch, noise)
    times, firsts, places, batches, accumulations, rates = np.array(rows, dtype=np.float64).T
    return BatchRun(times, firsts, places, batches, accumulations, rates, time_to_target_s=time_s, steps=steps, samples=samples)
