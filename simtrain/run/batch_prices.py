"""What a step takes by micro-batch and accumulation, asked from the step floor: the price list that a batch policy chooses from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from simtrain.core.errors import StrategyError
from simtrain.core.hardware import Cluster
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.units import format_bytes
from simtrain.core.workload import Workload
from simtrain.run.batch_policy import BatchPolicy
from simtrain.step.predict import schedule

_ASKED = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class PriceList:
    """Predicted seconds of a step. The second micro-batch may cost more than the first (gradients are added); all further ones cost alike.

    Attributes:
        times_s: By micro-batch, the time of a step that accumulates 1, 2 and 3 of them.
        memory_bytes: By micro-batch, the peak on a device, of those that fit and of those that do not.
        capacity_bytes: Of the device with the least.
        replicas: Ranks that average their gradients.
        assumptions: Of the predictions it rests on.
    """

    times_s: Mapping[int, tuple[float, float, float]]
    memory_bytes: Mapping[int, float]
    capacity_bytes: float
    replicas: int
    assumptions: tuple[str, ...] = ()

    def __call__(self, micro_batch: int, accumulation: int) -> float:
        """Returns the seconds of a step, infinite for a micro-batch that was not asked for or does not fit."""
        times = self.times_s.get(micro_batch)
        if times is None:
            return math.inf
        return times[accumulation - 1] if accumulation <= len(times) else times[-1] + (accumulation - len(times)) * (times[-1] - times[-2])

    def policy(self, **options: Any) -> BatchPolicy:
        """Returns a policy that chooses among the micro-batches that fit.

        Args:
            options: Further fields of `BatchPolicy`.
        """
        return BatchPolicy(
            tuple(sorted(self.memory_bytes)), memory_bytes=self.memory_bytes.__getitem__, memory_limit_bytes=self.capacity_bytes, **options
        )


def price_list(
    workload: Workload | str,
    cluster: Cluster | str,
    strategy: Strategy,
    micro_batches: Iterable[int],
    *,
    runtime: Runtime | str | None = None,
) -> PriceList:
    """Asks the step floor for every micro-batch, at one, two and three micro-batches a step.

    Args:
        workload: What is trained.
        cluster: On what.
        strategy: How; its micro-batch and accumulation do not matter.
        micro_batches: Samples per rank and backward pass.
        runtime: What carries it out.

    Raises:
        StrategyError: A pipeline, whose steps do not grow evenly with accumulation, or no micro-batch that fits.
    """
    if strategy.pipeline > 1 or strategy.plan:
        raise StrategyError(
            "a batch that follows the noise scale is priced for even replicas without a pipeline: give pipeline=1 and no plan"
        )
    times_s: dict[int, tuple[float, float, float]] = {}
    memory_bytes: dict[int, float] = {}
    capacity_bytes, assumptions = 0.0, dict[str, None]()
    for micro_batch in sorted(set(micro_batches)):
        one, two, three = (
            schedule(workload, cluster, strategy.with_(micro_batch=micro_batch, accumulation=k), runtime=runtime) for k in _ASKED
        )
        memory_bytes[micro_batch] = max(r.memory.device_bytes for r in (one, two, three))
        capacity_bytes = one.memory.capacity_bytes
        if memory_bytes[micro_batch] > capacity_bytes:
            break  # larger ones do not fit either
        times_s[micro_batch] = (one.step_time_s, two.step_time_s, three.step_time_s)
        assumptions |= dict.fromkeys(two.assumptions)
    if not times_s:
        least = min(memory_bytes)
        raise StrategyError(
            f"no micro-batch fits: {least} samples need {format_bytes(memory_bytes[least])}, there are {format_bytes(capacity_bytes)}"
        )
    return PriceList(times_s, memory_bytes, capacity_bytes, strategy.data, tuple(assumptions))
