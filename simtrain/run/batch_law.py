"""Steps to a target as a function of the batch size, and fits of that law to real runs.

McCandlish et al. 2018 (An Empirical Model of Large-Batch Training, equations 2.11 and 2.12): a target takes
`S(B) = S_min (1 + B_noise/B)` steps and `E(B) = E_min (1 + B/B_noise)` samples with `E_min = S_min B_noise`. AdaScale (Johnson et al. 2020)
and Pollux (Qiao et al. 2021) state the same as a gain over a base batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InputError
from simtrain.run.checks import above_zero


@dataclass(frozen=True, slots=True)
class BatchLaw:
    """`S(B) = S_min (1 + B_noise/B)`.

    Attributes:
        min_steps: Steps at an endless batch.
        noise_scale: Batch at which twice the steps of an endless batch are needed, in samples (or tokens, as the batch is counted).
        largest_error: Largest relative error over the runs it was fitted to (0 if it was stated, not fitted).
        fitted_batches: Smallest and largest batch it was fitted to; (0, inf) if stated.
        covariance: Of S_min, of S_min with S_min B_noise, and of S_min B_noise, by the scatter of the runs; zeros if stated.
        scatter: Standard deviation of a run's steps relative to the law; 0 if stated.
        freedom: Runs fitted to beyond the law's two unknowns.
    """

    min_steps: float
    noise_scale: float
    largest_error: float = 0.0
    fitted_batches: tuple[float, float] = (0.0, math.inf)
    covariance: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scatter: float = 0.0
    freedom: int = 0

    def __post_init__(self) -> None:
        above_zero(self, "min_steps", "noise_scale")

    def steps(self, batch: float) -> float:
        """Steps to the target with a batch.

        Raises:
            InputError: The batch is not above zero.
        """
        _check_batch(batch)
        return self.min_steps * (1 + self.noise_scale / batch)

    def samples(self, batch: float) -> float:
        """Samples to the target with a batch: `B S(B)`."""
        return batch * self.steps(batch)

    def interval(self, batch: float, level: float = 0.9) -> tuple[float, float]:
        """Steps between which a new run with a batch ends, with some confidence and if the law holds.

        By Student's t over the scatter of the runs and what it leaves open about the two unknowns. That the law itself bends where no run
        was made is not in it: see `doubt`.

        Raises:
            InputError: A law that was stated, not fitted, or a level that is no share.
        """
        from scipy.stats import t

        if self.freedom < 1:
            raise InputError("this law was stated, not fitted to runs: nothing says how far it may be off")
        if not 0 < level < 1:
            raise InputError(f"a level of confidence lies between 0 and 1, not {level!r}")
        steps, (own, both, samples) = self.steps(batch), self.covariance
        spread = math.sqrt(max(own + 2 * both / batch + samples / batch**2, 0.0) + (self.scatter * steps) ** 2)
        half = float(t.ppf((1 + level) / 2, self.freedom)) * spread
        return max(steps - half, 0.0), steps + half

    def doubt(self, batch: float) -> str | None:
        """Why the law should not be trusted at a batch, in words; `None` if nothing speaks against it."""
        low, high = self.fitted_batches
        if batch < low or batch > high:
            side = "above" if batch > high else "below"
            unseen = (
                f"; the noise scale, {self.noise_scale:.4g}, is beyond every run" if side == "above" and self.noise_scale > high else ""
            )
            return f"a batch of {batch:g} lies {side} the runs, which go from {low:g} to {high:g}: the law is extrapolated{unseen}"
        return None


def fit_batch_law(batches: Sequence[float], steps: Sequence[float]) -> BatchLaw:
    """Fits `S(B)` to runs that reached the same target, by least squares of the relative error.

    Two runs always fit, and the two smallest batches of a job were seen to extrapolate badly; so three different batches are the least.

    Args:
        batches: Batch size of each run.
        steps: Steps each run took.

    Raises:
        InputError: Lists of different length, fewer than three batches, values not above zero, or runs that contradict the law (steps
            that do not fall with the batch).
    """
    b, s = np.asarray(batches, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    if b.shape != s.shape or b.ndim != 1:
        raise InputError(f"each run needs a batch and its steps: {b.size} batches and {s.size} step counts were given")
    if len(np.unique(b)) < 3:
        raise InputError(f"the law has two unknowns: give runs with at least three different batches, not {len(np.unique(b))}")
    if not (np.isfinite(b).all() and np.isfinite(s).all() and (b > 0).all() and (s > 0).all()):
        raise InputError("batches and steps must be finite numbers above zero")
    columns = np.stack([1 / s, 1 / (b * s)], axis=1)
    (least, least_samples), *_ = np.linalg.lstsq(columns * [1, b.mean()], np.ones_like(s))
    least_samples *= b.mean()
    if least <= 0 or least_samples <= 0:
        raise InputError(
            "these runs contradict S_min (1 + B_noise/B): steps must fall with the batch, and level off, not fall faster than 1/B"
        )
    off = (least + least_samples / b) / s - 1
    freedom = len(b) - 2
    covariance = np.linalg.inv(columns.T @ columns) * float(off @ off) / freedom
    return BatchLaw(
        float(least),
        float(least_samples / least),
        float(np.abs(off).max()),
        (float(b.min()), float(b.max())),
        (float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1])),
        math.sqrt(float(off @ off) / freedom),
        freedom,
    )


def read_batch_runs(path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Reads runs from a CSV file with a header and the columns `batch` (samples of a step) and `steps` (until the target was reached).

    Returns:
        Batches and steps, one of each for every run.

    Raises:
        InputError: The file cannot be read, lacks a column, or a value is no number (with its line).
    """
    import csv
    from pathlib import Path

    batches, steps = [], []
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            for row in reader:
                try:
                    batches.append(float(row["batch"]))
                    steps.append(float(row["steps"]))
                except (KeyError, TypeError, ValueError):
                    raise InputError(f"{path}, line {reader.line_num}: expected numbers in the columns batch and steps") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the runs in {path}: {getattr(error, 'strerror', None) or 'it is no text file'}") from None
    return tuple(batches), tuple(steps)


def gain(batch: float, base_batch: float, noise_scale: float | None) -> float:
    """Steps of the base batch that one step of this batch is worth: AdaScale's gain `r = (phi + 1)/(phi/s + 1)`.

    Here `s = B/B0` and `phi = B_noise/B0` (Johnson et al. 2020); it is the ratio of steps to a target at both batches.

    Args:
        batch: Samples of the step.
        base_batch: Samples of the step that the learning rate was tuned for.
        noise_scale: In samples, may be infinite; `None` if unknown, which promises nothing for a larger batch.

    Raises:
        InputError: A batch that is not above zero, or a noise scale below it.
    """
    if noise_scale is None:
        return min(batch / base_batch, 1.0)
    return batch / base_batch * efficiency(batch, base_batch, noise_scale)


def efficiency(batch: float, base_batch: float, noise_scale: float) -> float:
    """Pollux's statistical efficiency: progress per sample relative to the base batch, `(B_noise + B0)/(B_noise + B)`.

    Raises:
        InputError: A batch that is not above zero, or a noise scale below it.
    """
    _check_batch(batch)
    _check_batch(base_batch)
    if not noise_scale >= 0:
        raise InputError(f"a noise scale is 0 or more, not {noise_scale!r}")
    return 1.0 if math.isinf(noise_scale) else (noise_scale + base_batch) / (noise_scale + batch)


def _check_batch(batch: float) -> None:
    if not batch > 0:
        raise InputError(f"a batch must be above zero, not {batch!r}")
