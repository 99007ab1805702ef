"""The batch law on public jobs: raw points, fits, and what a fit says of a run that it has not seen."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from simtrain.core.errors import UnknownNameError
from simtrain.run.batch_law import BatchLaw, fit_batch_law


@dataclass(frozen=True, slots=True)
class JobFit:
    """The law fitted to one job.

    Attributes:
        job: Name.
        model: What was trained.
        law: Fitted to all runs.
        errors: Relative error of each run by a law fitted to the others, in the order of their batches.
        linear_error: Worst error of linear scaling (twice the batch, half the steps) from the smallest batch, the null model.
    """

    job: str
    model: str
    law: BatchLaw
    errors: tuple[float, ...]
    linear_error: float


def fit_jobs() -> tuple[JobFit, ...]:
    """Fits every job, and predicts each of its runs from the others."""
    return tuple(_fit(name, job["model"], job["batches"], job["steps"]) for name, job in _data()["jobs"].items())


def source() -> str:
    """Returns where the points come from."""
    return str(_data()["source"])


def _fit(name: str, model: str, batches: Sequence[int], steps: Sequence[int]) -> JobFit:
    errors = []
    for i, (batch, count) in enumerate(zip(batches, steps, strict=True)):
        others = [j for j in range(len(batches)) if j != i]
        law = fit_batch_law([batches[j] for j in others], [steps[j] for j in others])
        errors.append(law.steps(batch) / count - 1)
    linear = max(abs(batches[0] * steps[0] / (b * s) - 1) for b, s in zip(batches, steps, strict=True))
    return JobFit(name, model, fit_batch_law(batches, steps), tuple(errors), linear)


def measured_noise(job: str) -> tuple[float, Callable[[float], float]]:
    """Returns steps without noise (S_min) and noise scale in samples by progress, as a job's gradients were measured.

    Progress is that of `simtrain.run.batch_run`: a step at the measured batch goes 1 / (1 + noise / batch) of one without noise.

    Raises:
        UnknownNameError: No such job.
    """
    known = _data()["noise"]
    if job not in known:
        raise UnknownNameError("job with a measured noise scale", job, known)
    row = known[job]
    at = np.array([0, *row["steps"]], dtype=np.float64)
    noise = row["batch"] * np.array(row["gradient_variance"]) / np.array(row["gradient_sqr"])
    fine = np.linspace(0, at[-1], 4000)
    grown = np.exp(np.interp(fine, at, np.log([noise[0], *noise])))  # between the points it grows evenly in its logarithm
    pace = 1 / (1 + grown / row["batch"])
    gone = np.concatenate([[0], np.cumsum((pace[1:] + pace[:-1]) / 2 * np.diff(fine))])
    return float(gone[-1]), lambda progress: float(np.interp(progress * gone[-1], gone, grown))


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(files("validation").joinpath("published/batch_law.toml").read_text(encoding="utf-8"))
