"""Loss against tokens and parameters: published laws, curves of one's own, fits to real runs, and how the noise scale grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.polynomial import FloatArray
from simtrain.run.checks import above_zero, not_negative


class LossLaw(Protocol):
    """Loss (nats per token) as a function of what a model of given size has learned from."""

    @property
    def source(self) -> str:
        """Where the law's constants come from."""
        ...

    def loss(self, parameters: float, tokens: FloatArray) -> FloatArray:
        """Loss after so many tokens at a batch far below the noise scale."""
        ...

    def floor(self, parameters: float) -> float:
        """What a model of this size never gets below."""
        ...

    def tokens(self, parameters: float, loss: float) -> float:
        """Tokens to a loss; `InputError` with the floor if it is out of reach."""
        ...


@dataclass(frozen=True, slots=True)
class ChinchillaLaw:
    """`L(N, D) = E + A/N^alpha + B/D^beta` (Hoffmann et al. 2022).

    Attributes:
        irreducible: E.
        model_factor: A.
        data_factor: B.
        model_power: alpha.
        data_power: beta.
        source: Of the constants.
    """

    irreducible: float
    model_factor: float
    data_factor: float
    model_power: float
    data_power: float
    source: str = "given by the user"

    def __post_init__(self) -> None:
        above_zero(self, "model_factor", "data_factor", "model_power", "data_power")
        not_negative(self, "irreducible")

    def loss(self, parameters: float, tokens: FloatArray) -> FloatArray:
        """See `LossLaw`."""
        return np.asarray(self.floor(parameters) + self.data_factor / tokens**self.data_power, dtype=np.float64)

    def floor(self, parameters: float) -> float:
        """See `LossLaw`."""
        return float(self.irreducible + self.model_factor / parameters**self.model_power)

    def tokens(self, parameters: float, loss: float) -> float:
        """See `LossLaw`."""
        floor = self.floor(parameters)
        _refuse_below(loss, floor, parameters)
        return float((self.data_factor / (loss - floor)) ** (1 / self.data_power))


@dataclass(frozen=True, slots=True)
class KaplanLaw:
    """`L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D` (Kaplan et al. 2020, equation 1.5); N without embeddings.

    Attributes:
        model_scale: N_c.
        data_scale: D_c in tokens.
        model_power: alpha_N.
        data_power: alpha_D.
        source: Of the constants.
    """

    model_scale: float
    data_scale: float
    model_power: float
    data_power: float
    source: str = "given by the user"

    def __post_init__(self) -> None:
        above_zero(self, "model_scale", "data_scale", "model_power", "data_power")

    def loss(self, parameters: float, tokens: FloatArray) -> FloatArray:
        """See `LossLaw`."""
        return np.asarray((self._model_part(parameters) + self.data_scale / tokens) ** self.data_power, dtype=np.float64)

    def floor(self, parameters: float) -> float:
        """See `LossLaw`."""
        return float((self.model_scale / parameters) ** self.model_power)

    def tokens(self, parameters: float, loss: float) -> float:
        """See `LossLaw`."""
        _refuse_below(loss, self.floor(parameters), parameters)
        return float(self.data_scale / (loss ** (1 / self.data_power) - self._model_part(parameters)))

    def _model_part(self, parameters: float) -> float:
        return float((self.model_scale / parameters) ** (self.model_power / self.data_power))


@dataclass(frozen=True, slots=True)
class LossCurve:
    """A curve of one's own: loss measured at token counts, between which it is interpolated in the logarithms. Never extrapolated.

    Attributes:
        points: (tokens, loss), tokens rising and losses falling.
        source: Of the points.
    """

    points: tuple[tuple[float, float], ...]
    source: str = "curve given by the user"

    def __post_init__(self) -> None:
        tokens, losses = np.array([p[0] for p in self.points]), np.array([p[1] for p in self.points])
        if len(self.points) < 2 or not (tokens[0] > 0 and (np.diff(tokens) > 0).all() and (np.diff(losses) < 0).all() and losses[-1] > 0):
            raise InputError("a loss curve needs at least two points above zero, with rising tokens and falling losses (smooth it first)")

    def loss(self, parameters: float, tokens: FloatArray) -> FloatArray:
        """See `LossLaw`; before the first point the first loss."""
        del parameters
        known_tokens, known_losses = np.array(self.points).T
        if np.max(tokens) > known_tokens[-1] * (1 + 1e-9):
            raise InputError(f"the loss curve ends at {known_tokens[-1]:.4g} tokens and is not extrapolated to {np.max(tokens):.4g}")
        return np.asarray(np.exp(np.interp(np.log(tokens), np.log(known_tokens), np.log(known_losses))), dtype=np.float64)

    def floor(self, parameters: float) -> float:
        """See `LossLaw`: the last loss of the curve."""
        del parameters
        return self.points[-1][1]

    def tokens(self, parameters: float, loss: float) -> float:
        """See `LossLaw`."""
        del parameters
        known_tokens, known_losses = np.array(self.points).T
        if not known_losses[-1] <= loss <= known_losses[0]:
            raise InputError(f"loss {loss:g} is outside of the curve, which goes from {known_losses[0]:g} to {known_losses[-1]:g}")
        return float(np.exp(np.interp(-np.log(loss), -np.log(known_losses), np.log(known_tokens))))


@dataclass(frozen=True, slots=True)
class NoiseGrowth:
    """The noise scale as a power of the loss: `B_noise(L) = B_1 / L^power`, in tokens. It grows while the loss falls.

    Attributes:
        at_loss_one: B_1, tokens.
        power: 0 for a noise scale that stays.
        source: Of the constants.
    """

    at_loss_one: float
    power: float = 0.0
    source: str = "given by the user"

    def __post_init__(self) -> None:
        above_zero(self, "at_loss_one")
        not_negative(self, "power")

    def tokens(self, loss: FloatArray) -> FloatArray:
        """Noise scale at a loss."""
        return np.asarray(self.at_loss_one / loss**self.power, dtype=np.float64)


CHINCHILLA = ChinchillaLaw(
    1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, equation 10"
)
CHINCHILLA_REPLICATED = ChinchillaLaw(
    1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt (arXiv 2404.10102)"
)
KAPLAN = KaplanLaw(
    6.4e13, 1.8e13, 0.076, 0.103, "Kaplan et al. 2020, Scaling Laws for Neural Language Models, table 2 (recalled, not looked up)"
)
KAPLAN_NOISE = NoiseGrowth(
    2.1e8, 1 / 0.21, "Kaplan et al. 2020, equation 5.3: critical batch 2.1e8 tokens / L^(1/0.21) (recalled, not looked up)"
)
LOSS_LAWS: dict[str, LossLaw] = {"chinchilla": CHINCHILLA, "chinchilla-replicated": CHINCHILLA_REPLICATED, "kaplan": KAPLAN}
"""Published laws by name. Their losses belong to their own data and tokenizer: only differences carry over to others."""


def _refuse_below(loss: float, floor: float, parameters: float) -> None:
    """Refuses a loss that no amount of data reaches.

    Raises:
        InputError: With the floor.
    """
    if not loss > floor:
        raise InputError(f"a loss of {loss:g} is never reached: the law's floor for {parameters:.4g} parameters is {floor:.4f}")


def fit_chinchilla(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> ChinchillaLaw:
    """Fits Chinchilla's law to final losses of runs.

    The law is linear in E, A and B once the powers are fixed; so the powers are searched and the rest follows by least squares of the
    relative error with coefficients not below zero (variable projection).

    Args:
        parameters: Of each run's model.
        tokens: Each run learned from.
        losses: At the end of each run.

    Raises:
        InputError: Lists of different length, fewer than six runs, or runs that do not vary in size and data.
    """
    from scipy.optimize import minimize, nnls

    n, d, loss = (np.asarray(v, dtype=np.float64) for v in (parameters, tokens, losses))
    if not (n.shape == d.shape == loss.shape) or len(n) < 6 or not all((v > 0).all() for v in (n, d, loss)):
        raise InputError("fitting five constants needs at least six runs, each with parameters, tokens and a loss above zero")
    if len(np.unique(n)) < 3 or len(np.unique(d)) < 3:
        raise InputError("runs must vary: at least three model sizes and three token counts")

    def project(powers: FloatArray) -> tuple[FloatArray, float]:
        columns = np.stack([np.ones_like(n), (n / n.max()) ** -powers[0], (d / d.max()) ** -powers[1]], axis=1) / loss[:, None]
        factors, residual = nnls(columns, np.ones_like(n))
        return factors, float(residual)

    def residual(powers: FloatArray) -> float:
        return project(powers)[1] if (powers > 0.01).all() and (powers < 2).all() else 1e9

    grid = [np.array([a, b]) for a in np.linspace(0.1, 1, 10) for b in np.linspace(0.1, 1, 10)]
    start = min(grid, key=residual)
    best = minimize(residual, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 2000}).x
    (irreducible, a, b), _ = project(best)
    if a <= 0 or b <= 0:
        raise InputError("these runs contradict the law: the loss must fall with model size and with data")
    model_power, data_power = float(best[0]), float(best[1])
    a, b = float(a * n.max() ** model_power), float(b * d.max() ** data_power)
    return ChinchillaLaw(float(irreducible), a, b, model_power, data_power, f"fit to {len(n)} runs")
