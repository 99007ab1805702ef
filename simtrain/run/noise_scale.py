"""The gradient noise scale from norms of gradients: what it takes to know how large a batch pays.

With gradients g of single samples, mean G and covariance Sigma, the noise scale is tr(Sigma) / |G|^2, in samples (McCandlish et al. 2018,
"An empirical model of large-batch training", the "simple" noise scale). The squared norm of the mean over B samples has the expectation
|G|^2 + tr(Sigma) / B, so two sizes of B give both terms without bias. Here the two sizes are one micro-batch and the whole batch that a
step accumulates: a noise scale extrapolated from the smallest batch alone is worse than assuming linear scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from simtrain.core.errors import InputError

MIN_SAMPLES = 5
"""Steps measured before a noise scale is given: fewer say nothing of their own spread."""


@dataclass(frozen=True, slots=True)
class NoiseSample:
    """What one step says; both numbers are unbiased, and either may be negative.

    Attributes:
        trace: Trace of the covariance of a single sample's gradient.
        gradient_sqr: Squared norm of the mean gradient.
        weight: Degrees of freedom behind it: parts of the batch, less one.
    """

    trace: float
    gradient_sqr: float
    weight: int


def noise_sample(part_sqr: float, whole_sqr: float, parts: int, part_size: int) -> NoiseSample:
    """Separates signal and noise in the gradients of one step.

    Args:
        part_sqr: Squared norm of the gradient of a part (a micro-batch of one rank), mean over the parts.
        whole_sqr: Squared norm of the mean of the parts' gradients.
        parts: Micro-batches of all ranks together.
        part_size: Samples of a part.

    Returns:
        With k parts of b samples: |G|^2 = (k whole - part) / (k - 1) and tr(Sigma) = b k (part - whole) / (k - 1).

    Raises:
        InputError: Fewer than two parts, or no samples.
    """
    if parts < 2:
        raise InputError(f"the noise scale needs two parts of a batch or more, not {parts}: accumulate, or use several ranks")
    if part_size < 1:
        raise InputError(f"a part has one sample or more, not {part_size}")
    return NoiseSample(
        trace=part_size * parts * (part_sqr - whole_sqr) / (parts - 1),
        gradient_sqr=(parts * whole_sqr - part_sqr) / (parts - 1),
        weight=parts - 1,
    )


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """An averaged noise scale and how sure it is.

    Attributes:
        samples: tr(Sigma) / |G|^2, in samples; infinite where the signal cannot be told from zero.
        low: The same with |G|^2 one standard error higher.
        high: The same with |G|^2 one standard error lower, infinite if that is below zero.
    """

    samples: float
    low: float
    high: float

    @classmethod
    def exact(cls, samples: float) -> NoiseScale:
        """Returns a noise scale that is known."""
        return cls(samples, samples, samples)


@dataclass(slots=True)
class NoiseAverage:
    """Running averages of trace and squared norm; the ratio is taken of the averages, never averaged itself.

    Exponentially weighted, with each step counting by its degrees of freedom; dividing by the sum of the weights leaves no bias towards
    the beginning. Standard errors take the steps as independent, and so understate where gradients of neighbouring steps go together.

    Attributes:
        decay: What a measured step's weight is multiplied by with each further one.
        count: Steps measured.
    """

    decay: float = 0.98
    count: int = 0
    _weight: float = 0.0
    _weight_sqr: float = 0.0
    _trace: float = 0.0
    _gradient: float = 0.0
    _gradient_sqr: float = 0.0
    _gradient_cross: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise InputError(f"decay lies above 0 and up to 1 (which forgets nothing), not {self.decay!r}")

    def add(self, sample: NoiseSample) -> None:
        """Takes in a measured step; one that is not finite (an overflow of scaled gradients) is left out."""
        if not (math.isfinite(sample.trace) and math.isfinite(sample.gradient_sqr)):
            return
        weight, decay = float(sample.weight), self.decay
        self.count += 1
        self._weight = decay * self._weight + weight
        self._trace = decay * self._trace + weight * sample.trace
        self._gradient = decay * self._gradient + weight * sample.gradient_sqr
        self._weight_sqr = decay**2 * self._weight_sqr + weight**2
        self._gradient_cross = decay**2 * self._gradient_cross + weight**2 * sample.gradient_sqr
        self._gradient_sqr = decay**2 * self._gradient_sqr + weight**2 * sample.gradient_sqr**2

    @property
    def trace(self) -> float:
        """Trace of the covariance of a single sample's gradient, 0 before anything was measured."""
        return self._trace / self._weight if self.count else 0.0

    @property
    def gradient_sqr(self) -> float:
        """Squared norm of the mean gradient, 0 before anything was measured."""
        return self._gradient / self._weight if self.count else 0.0

    @property
    def gradient_sqr_error(self) -> float:
        """Standard error of `gradient_sqr`, from the spread of the measured steps; infinite before there are two."""
        if self.count < 2:
            return math.inf
        mean = self.gradient_sqr
        spread = self._gradient_sqr - 2 * mean * self._gradient_cross + mean**2 * self._weight_sqr
        effective = self._weight**2 / self._weight_sqr
        return math.sqrt(max(spread, 0.0) * effective / max(effective - 1, 1e-9)) / self._weight

    def noise_scale(self) -> NoiseScale | None:
        """Returns the noise scale, `None` as long as too few steps were measured or they contradict any signal or noise."""
        if self.count < MIN_SAMPLES or self.trace <= 0:
            return None
        signal, error = self.gradient_sqr, self.gradient_sqr_error
        if signal + error <= 0:
            return None

        def ratio(gradient_sqr: float) -> float:
            return self.trace / gradient_sqr if gradient_sqr > 0 else math.inf

        return NoiseScale(ratio(signal), ratio(signal + error), ratio(signal - error))

    def state_dict(self) -> dict[str, float]:
        """Returns plain numbers; `load_state_dict` reads them back."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what `state_dict` returned."""
        for name in asdict(self):
            setattr(self, name, state[name])
