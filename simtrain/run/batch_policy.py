"""Which batch next: accumulation and micro-batch that reach the target soonest, within memory, changed only when it pays.

A step of B samples costs t(B) and goes as far as 1 / (1 + noise scale / B) steps without noise would (McCandlish et al. 2018), so the
time to the target is proportional to t(B) (1 + noise scale / B). That product is minimised over what fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from simtrain.core.errors import InputError
from simtrain.core.units import format_bytes
from simtrain.run.noise_scale import NoiseScale

Price = Callable[[int, int], float]
"""Seconds of a step by micro-batch and accumulation; infinite where unknown, which is never chosen."""


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """A batch, as it is carried out.

    Attributes:
        micro_batch: Samples per rank and backward pass.
        accumulation: Micro-batches per rank and step.
        replicas: Ranks that average their gradients.
    """

    micro_batch: int
    accumulation: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation", "replicas"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is 1 or more, not {getattr(self, name)!r}")

    @property
    def batch(self) -> int:
        """Samples per step."""
        return self.micro_batch * self.accumulation * self.replicas


@dataclass(frozen=True, slots=True)
class StepPrice:
    """Seconds of a step that accumulates: `update_s + accumulation (pass_s + sample_s micro_batch)`.

    Attributes:
        update_s: Once a step: optimizer, exposed communication.
        pass_s: Once a micro-batch, whatever its size: launches, weights read.
        sample_s: For each sample.
    """

    update_s: float
    pass_s: float
    sample_s: float

    def __call__(self, micro_batch: int, accumulation: int) -> float:
        """Returns the seconds of a step."""
        return self.update_s + accumulation * (self.pass_s + self.sample_s * micro_batch)


@dataclass(slots=True)
class MeasuredPrice:
    """Prices learnt from steps as they run. A micro-batch that never ran has none: nothing is extrapolated.

    Attributes:
        memory: Weight of the newest measurement in the running average.
    """

    memory: float = 0.2
    pass_s: dict[int, float] = field(default_factory=dict)
    update_s: float | None = None

    def add(self, micro_batch: int, pass_s: float, update_s: float) -> None:
        """Takes in a step: seconds of a micro-batch's passes, and of everything once a step."""
        old = self.pass_s.get(micro_batch)
        self.pass_s[micro_batch] = pass_s if old is None else old + self.memory * (pass_s - old)
        self.update_s = update_s if self.update_s is None else self.update_s + self.memory * (update_s - self.update_s)

    def __call__(self, micro_batch: int, accumulation: int) -> float:
        """Returns the seconds of a step, infinite if its micro-batch never ran."""
        if micro_batch not in self.pass_s or self.update_s is None:
            return math.inf
        return self.update_s + accumulation * self.pass_s[micro_batch]

    def state_dict(self) -> dict[str, Any]:
        """Returns plain data; `load_state_dict` reads it back."""
        return {"pass_s": dict(self.pass_s), "update_s": self.update_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.pass_s = {int(k): float(v) for k, v in state["pass_s"].items()}
        self.update_s = state["update_s"]


def relative_time(step_time_s: float, batch: int, noise_scale: float) -> float:
    """Returns the time to the target up to a factor that no batch changes: t (1 + noise / B) / (1 + noise)."""
    if math.isinf(noise_scale):
        return step_time_s / batch
    return step_time_s * (1 + noise_scale / batch) / (1 + noise_scale)


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """What may be chosen, and how reluctantly.

    Attributes:
        micro_batches: Samples per backward pass to choose from.
        max_accumulation: Micro-batches per rank and step, at most.
        max_batch: Samples per step, at most, where a learning rate or a data set sets a limit.
        memory_bytes: Peak memory by micro-batch (accumulation does not add to it).
        memory_limit_bytes: What there is.
        margin: A change must save at least this share of the time to the target, at both ends of the noise scale's standard error.
        dwell_steps: Steps between two changes, at least.
        max_growth: A change multiplies the batch by no more than this, and divides it by no more.
    """

    micro_batches: tuple[int, ...]
    max_accumulation: int = 64
    max_batch: int | None = None
    memory_bytes: Callable[[int], float] | None = None
    memory_limit_bytes: float = math.inf
    margin: float = 0.03
    dwell_steps: int = 50
    max_growth: float = 2.0

    def __post_init__(self) -> None:
        if not self.micro_batches or min(self.micro_batches) < 1:
            raise InputError(f"micro_batches are numbers of samples from 1 up, not {self.micro_batches!r}")
        if self.max_accumulation < 1 or self.dwell_steps < 1:
            raise InputError(f"max_accumulation ({self.max_accumulation}) and dwell_steps ({self.dwell_steps}) are 1 or more")
        if not 0 <= self.margin < 1:
            raise InputError(f"margin is a share of the time between 0 and 1, not {self.margin!r}")
        if self.max_growth <= 1:
            raise InputError(f"max_growth is above 1, not {self.max_growth!r}")
        self._fitting()

    def _fitting(self) -> tuple[int, ...]:
        if self.memory_bytes is None:
            return self.micro_batches
        fitting = tuple(b for b in self.micro_batches if self.memory_bytes(b) <= self.memory_limit_bytes)
        if not fitting:
            least = min(self.micro_batches)
            raise InputError(
                f"no micro-batch fits: {least} samples need {format_bytes(self.memory_bytes(least))}, "
                f"there are {format_bytes(self.memory_limit_bytes)}"
            )
        return fitting

    def choices(self, replicas: int = 1) -> tuple[BatchChoice, ...]:
        """Returns everything that may be chosen.

        Raises:
            InputError: Even the smallest batch is above `max_batch`.
        """
        limit = self.max_batch or math.inf
        pairs = (BatchChoice(b, k, replicas) for b in self._fitting() for k in range(1, self.max_accumulation + 1))
        allowed = tuple(choice for choice in pairs if choice.batch <= limit)
        if not allowed:
            raise InputError(f"{replicas} ranks with {min(self._fitting())} samples each exceed max_batch = {self.max_batch}")
        return allowed

    def best(self, noise_scale: float, price: Price, replicas: int = 1) -> BatchChoice:
        """Returns the batch with the least predicted time to the target; among equals the smallest batch.

        Raises:
            InputError: No choice has a price.
        """
        return self._least(self.choices(replicas), noise_scale, price)

    def next(self, current: BatchChoice, noise: NoiseScale | None, price: Price, steps_since_change: int) -> BatchChoice:
        """Returns the batch of the next steps: another one only if the gain is beyond margin and doubt.

        Args:
            current: What runs now.
            noise: As measured; `None` keeps what runs.
            price: Seconds of a step by micro-batch and accumulation.
            steps_since_change: Since the batch last changed.
        """
        if noise is None or steps_since_change < self.dwell_steps:
            return current
        reach = [c for c in self.choices(current.replicas) if 1 / self.max_growth <= c.batch / current.batch <= self.max_growth]
        priced = [c for c in reach if math.isfinite(price(c.micro_batch, c.accumulation))]
        if not priced or not math.isfinite(price(current.micro_batch, current.accumulation)):
            return current
        candidate = self._least(tuple(priced), noise.samples if math.isfinite(noise.samples) else noise.low, price)
        worth = all(_time(candidate, n, price) < (1 - self.margin) * _time(current, n, price) for n in (noise.low, noise.high))
        return candidate if worth else current

    @staticmethod
    def _least(choices: tuple[BatchChoice, ...], noise_scale: float, price: Price) -> BatchChoice:
        least = min(choices, key=lambda c: (_time(c, noise_scale, price), c.batch))
        if math.isinf(_time(least, noise_scale, price)):
            raise InputError("no batch has a price: give one, or run a step first")
        return least


def _time(choice: BatchChoice, noise_scale: float, price: Price) -> float:
    return relative_time(price(choice.micro_batch, choice.accumulation), choice.batch, noise_scale)
