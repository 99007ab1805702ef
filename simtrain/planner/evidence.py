"""How sure: the measured runs nearest to a prediction, and how far off predictions of them are.

Whoever knows measured runs registers a function in the entry point group `simtrain.evidence`; simtrain itself knows none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log2
from typing import Any, Protocol

from simtrain.core import catalog
from simtrain.core.hardware import Cluster
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload

NEAREST = 5
"""Measured runs that are shown."""

FAR = 6.0
"""Distance beyond which the nearest run says little: six doublings or other choices (a choice of words, not a measurement)."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What makes two runs alike.

    Attributes:
        numbers: Sizes and degrees, above 0; a factor of two in one of them is a distance of 1.
        choices: What is the same or is not; each difference is a distance of 1.
    """

    numbers: Mapping[str, float]
    choices: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Nearby:
    """A measured run, and what is predicted for it.

    Attributes:
        name: Short.
        source: Where the figure was read.
        distance: From what was asked: doublings and other choices, see `distance`.
        differences: In words.
        measured_s: Time of a step.
        predicted_s: By `estimate`; `None` where that refuses.
        memory_error: Of peak memory, relative; `None` where none is printed.
    """

    name: str
    source: str
    distance: float
    differences: tuple[str, ...]
    measured_s: float
    predicted_s: float | None = None
    memory_error: float | None = None

    @property
    def error(self) -> float | None:
        """Relative error of the step time, with sign."""
        return None if self.predicted_s is None else self.predicted_s / self.measured_s - 1

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self) | {"error": self.error}


class Provider(Protocol):
    """Finds measured runs."""

    def __call__(self, asked: Traits, count: int) -> Sequence[Nearby]:
        """Returns the nearest, nearest first."""
        ...


def traits(workload: Workload, cluster: Cluster, strategy: Strategy) -> Traits:
    """What a question is compared by."""
    devices = sorted({d.name for d in cluster.devices})
    zero = strategy.zero if strategy.data * strategy.context > 1 else 0  # one alone has nobody to share with
    return Traits(
        numbers={
            "parameters": float(workload.parameter_count),
            "sequence": float(workload.sequence),
            "devices": float(strategy.ranks),
            "micro_batch": float(strategy.micro_batch),
            "tensor": float(strategy.tensor),
            "pipeline": float(strategy.pipeline),
            "context": float(strategy.context),
        },
        choices={
            "device": " + ".join(devices),
            "precision": strategy.precision.partition("-")[0],
            "checkpoint": strategy.checkpoint,
            "sharding": {0: "none", 1: "optimizer", 2: "gradients", 3: "parameters"}[zero],
            "schedule": strategy.schedule if strategy.pipeline > 1 else "none",
        },
    )


def distance(a: Traits, b: Traits) -> tuple[float, tuple[str, ...]]:
    """How far apart two runs are, and in what.

    The sum of |log2| of the ratios of their numbers, plus 1 for every choice that differs. A convention to sort by, not a metric of
    errors: nothing is fitted to make near runs the ones that are predicted well.

    Returns:
        The distance, and what differs, as `b` has it.
    """
    total, words = 0.0, []
    for name, value in a.numbers.items():
        apart = abs(log2(b.numbers[name] / value))
        total += apart
        if apart > 0.1:
            words.append(f"{name} {_short(b.numbers[name])} instead of {_short(value)}")
    for name, choice in a.choices.items():
        if b.choices[name] != choice:
            total += 1.0
            words.append(f"{name} {b.choices[name]} instead of {choice}")
    return total, tuple(words)


def nearest(workload: Workload, cluster: Cluster, strategy: Strategy, *, count: int = NEAREST) -> tuple[Nearby, ...]:
    """The measured runs nearest to a question, of all that are registered.

    Args:
        workload: What is trained.
        cluster: On what.
        strategy: How.
        count: How many.
    """
    asked = traits(workload, cluster, strategy)
    found: list[Nearby] = []
    for name in catalog.names("evidence"):
        provider: Provider = catalog.find("evidence", name)
        found += provider(asked, count)
    return tuple(sorted(found, key=lambda n: n.distance)[:count])


def in_words(found: Sequence[Nearby]) -> str:
    """One sentence about how near the nearest measured run is, and how predictions of the nearest fared."""
    if not found:
        return "no measured run is known to compare with"
    first = found[0]
    far = "; that is far, so trust the numbers less" if first.distance > FAR else ""
    sentence = f"the nearest measured run is {first.name}, {first.distance:.1f} doublings or other choices away{far}"
    errors = [abs(n.error) for n in found if n.error is not None]
    if errors:
        mean, worst = sum(errors) / len(errors), max(errors)
        sentence += f"; predictions of the {len(errors)} nearest are off by {mean:.1%} on average, {worst:.1%} at worst"
    return sentence


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


__all__ = ["Nearby", "Traits", "distance", "in_words", "nearest", "traits"]
