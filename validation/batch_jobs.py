"""The batch law on public jobs: raw points, fits, and what a fit says of a run that it has not seen."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.run.batch_law import BatchLaw, fit_batch_law


@dataclass(frozen=True, slots=True)
class JobFit:
    """The law fitted to one job.

    Attributes:
        job: Name.
        model: What was trained.
        law: Fitted to all runs.
        errors: Relative error of each run by a law fitted to the others, where these allow one.
        linear_error: Worst error of linear scaling (twice the batch, half the steps) from the smallest batch, the null model.
    """

    job: str
    model: str
    law: BatchLaw
    errors: tuple[float, ...]
    linear_error: float


@dataclass(frozen=True, slots=True)
class JobFits:
    """Fits of several jobs, or of one's own.

    Attributes:
        jobs: Each with its law.
        source: Of the runs.
        asked: Batches for which each law is asked.
    """

    jobs: tuple[JobFit, ...]
    source: str
    asked: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        answers = [
            {"job": f.job, "batch": b, "steps": f.law.steps(b), "interval": f.law.interval(b), "doubt": f.law.doubt(b)}
            for f in self.jobs
            for b in self.asked
        ]
        return {"source": self.source, "jobs": [asdict(f) for f in self.jobs], "asked": answers}

    def __str__(self) -> str:
        lines = [f"{'job':<13}{'model':<28}{'S_min':>9}{'B_noise':>11}{'90 % interval':>23}{'fit':>8}{'left out':>10}{'linear':>9}"]
        for f in self.jobs:
            law, worst = f.law, f"{max(map(abs, f.errors)):.1%}" if f.errors else "-"
            lines.append(
                f"{f.job:<13}{f.model:<28}{law.min_steps:>9.4g}{law.noise_scale:>11.4g}{_noise_interval(law):>23}{law.largest_error:>8.1%}"
                f"{worst:>10}{f.linear_error:>9.1%}"
            )
        for f in self.jobs:
            for b in self.asked:
                low, high = f.law.interval(b)
                lines.append(f"batch {b:g}: {f.law.steps(b):.4g} steps, {low:.4g} to {high:.4g} with 90 % confidence if the law holds")
                if doubt := f.law.doubt(b):
                    lines.append(f"  careful: {doubt}")
            if len(self.jobs) == 1 and f.law.noise_scale > f.law.fitted_batches[1]:
                lines.append(
                    f"careful: no run is as large as the noise scale ({f.law.noise_scale:.4g}), so S_min is hardly seen; laws of small "
                    "batches alone were seen to extrapolate worse than linear scaling: run a batch near it"
                )
        lines.append("fit: worst error of a run; left out: of a run by the others' law; linear: if steps fell as 1 / batch (null model)")
        return "\n".join([*lines, f"runs: {self.source}"])


def _noise_interval(law: BatchLaw) -> str:
    """Noise scale between the ends of the interval that its own and S_min's scatter give, by the ratio's first order."""
    from scipy.stats import t

    own, both, samples = law.covariance
    b = law.noise_scale
    half = float(t.ppf(0.95, law.freedom)) * math.sqrt(max(samples - 2 * b * both + b * b * own, 0.0)) / law.min_steps
    return f"{max(b - half, 0):.4g} to {b + half:.4g}"


def fit_jobs() -> tuple[JobFit, ...]:
    """Fits every public job, and predicts each of its runs from the others."""
    return tuple(fit_job(name, job["model"], job["batches"], job["steps"]) for name, job in _data()["jobs"].items())


def source() -> str:
    """Returns where the points come from."""
    return str(_data()["source"])


def fit_job(name: str, model: str, batches: Sequence[float], steps: Sequence[float]) -> JobFit:
    """Fits the law to one job's runs, and predicts each of them from the others where these are enough for a law.

    Raises:
        InputError: Too few runs, or runs that contradict the law.
    """
    law, errors = fit_batch_law(batches, steps), []
    for i, (batch, count) in enumerate(zip(batches, steps, strict=True)):
        others = [j for j in range(len(batches)) if j != i]
        try:
            errors.append(fit_batch_law([batches[j] for j in others], [steps[j] for j in others]).steps(batch) / count - 1)
        except InputError:  # without this run they are too few, or contradict the law
            continue
    first = int(np.argmin(batches))
    linear = max(abs(batches[first] * steps[first] / (b * s) - 1) for b, s in zip(batches, steps, strict=True))
    return JobFit(name, model, law, tuple(errors), linear)


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
