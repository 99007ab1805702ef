"""Learning rates: linear warm-up, cosine decay, and how they follow the batch.

Progress counts in steps of the base batch, so that a schedule means the same whatever batches a run takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.run.batch_law import gain

Scaling = Literal["none", "linear", "square-root", "adascale"]
SCALINGS: tuple[Scaling, ...] = ("none", "linear", "square-root", "adascale")


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Multiplies the learning rate that was tuned for the base batch.

    Attributes:
        base_batch: Samples per step that it was tuned for.
        total_steps: Length of the schedule, in steps of the base batch.
        warmup_steps: Linear rise from zero, in steps of the base batch.
        final: Share of the peak at which the cosine ends, and stays.
        scaling: How the rate follows the batch: "linear" (SGD), "square-root" (Adam: the usual argument from stochastic differential
            equations; recalled, not looked up), "adascale" (by the measured noise scale), or "none".
    """

    base_batch: int
    total_steps: float = math.inf
    warmup_steps: float = 0.0
    final: float = 0.0
    scaling: Scaling = "adascale"

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise UnknownNameError("learning rate scaling", str(self.scaling), SCALINGS)
        if self.base_batch < 1:
            raise InputError(f"base_batch is a number of samples from 1 up, not {self.base_batch!r}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise InputError(f"warm-up of {self.warmup_steps!r} steps does not fit into a schedule of {self.total_steps!r}")
        if not 0 <= self.final <= 1:
            raise InputError(f"final is a share of the peak between 0 and 1, not {self.final!r}")

    def shape(self, progress_steps: float) -> float:
        """Returns the schedule without the batch: share of the peak for the step that begins at this progress."""
        if progress_steps < self.warmup_steps:
            return min((progress_steps + 1) / self.warmup_steps, 1.0)
        if math.isinf(self.total_steps):
            return 1.0
        part = min((progress_steps - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * part)) / 2

    def gain(self, batch: float, noise_scale: float | None = None) -> float:
        """Returns what a batch multiplies the rate by."""
        scale = batch / self.base_batch
        by_rule = {"none": 1.0, "linear": scale, "square-root": math.sqrt(scale)}
        return by_rule[self.scaling] if self.scaling in by_rule else gain(batch, self.base_batch, noise_scale)

    def factor(self, progress_steps: float, batch: float, noise_scale: float | None = None) -> float:
        """Returns what the base rate is multiplied by in a step."""
        return self.shape(progress_steps) * self.gain(batch, noise_scale)

    def advance(self, batch: float, noise_scale: float | None = None) -> float:
        """Returns how far a step goes, in steps of the base batch: its gain under AdaScale, its samples otherwise."""
        if self.scaling == "adascale":
            return gain(batch, self.base_batch, noise_scale)
        return batch / self.base_batch
