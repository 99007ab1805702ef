"""Does a way of saving time or memory cost quality? Two small real trainings, paired by seed, and a test that can also say "not told".

Each component is compared with the same baseline: fp32, a fixed batch, a constant learning rate, nothing recomputed. A pair shares its
seed: initial weights, order of the data, split. The question is whether the mean difference lies within a band (two one-sided t-tests on
paired differences, 5 % each): 0.5 percentage points of accuracy, or 0.5 % of the loss. A band that the interval neither lies within nor
lies outside of is not told, and the number of seeds that would tell it is given.

All get the same samples. The dynamic batch takes larger batches where a step has a fixed price, and that costs samples and saves time: so
it runs twice, with the samples of the baseline and with its time by one price list. "all" puts every component together, with the
baseline's samples.

Folds: a seed holds out one part of the data, and every part is held out equally often.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from simtrain.core.errors import InputError
from validation.measure import THREAD_ENVIRONMENT, MeasurementError, Progress, environment
from validation.measurement import Environment

COMPONENTS = ("dynamic-batch", "dynamic-batch-samples", "bf16-amp", "checkpoint", "schedule", "all")
BASELINE = "baseline"
BAND = 0.005
LEVEL = 0.05
SEEDS = {"digits": 15, "text": 10}
"""Tasks and their seeds, so that every fold is held out equally often; set before any of them ran."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A component beside the baseline on one task.

    Attributes:
        task: "digits" (accuracy on test images) or "text" (loss on validation text).
        component: What was changed.
        baseline: Mean of the baseline's quality.
        difference: Mean of the paired differences: of accuracy as it is, of loss relative to the baseline. Above zero is better.
        low: Of the interval that holds the mean difference with 90 % confidence.
        high: Likewise.
        seeds: Pairs.
        verdict: "equivalent", "better", "worse" or "not told".
        seeds_needed: Pairs that would tell equivalence if mean and spread stay as they are; `None` if none would.
        cpu_share: CPU time over that of the baseline, less one.
    """

    task: str
    component: str
    baseline: float
    difference: float
    low: float
    high: float
    seeds: int
    verdict: str
    seeds_needed: int | None
    cpu_share: float


def judge(differences: Sequence[float], band: float = BAND, level: float = LEVEL) -> tuple[float, float, str, int | None]:
    """Judges paired differences by two one-sided t-tests.

    Args:
        differences: One for each seed; above zero is better.
        band: Half the width of what counts as equal.
        level: Of each test.

    Returns:
        Ends of the interval of confidence 1 - 2 level, the verdict, and the seeds needed to tell equivalence.

    Raises:
        InputError: Fewer than three pairs.
    """
    from scipy.stats import t

    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 3:
        raise InputError(f"{len(values)} pairs of seeds tell nothing: run three or more")
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    half = float(t.ppf(1 - level, len(values) - 1)) * deviation / math.sqrt(len(values))
    low, high = mean - half, mean + half
    needed = None if abs(mean) >= band else max(3, math.ceil((1.645 * deviation / (band - abs(mean))) ** 2))
    if -band < low and high < band:
        return low, high, "equivalent", needed
    if low > band:
        return low, high, "better", needed
    if high < -band:
        return low, high, "worse", needed
    return low, high, "not told", needed


@dataclass(frozen=True, slots=True)
class QualityReport:
    """All verdicts.

    Attributes:
        verdicts: One for each task and component.
        runs: What every training ended with.
        environment: Where and when.
    """

    verdicts: tuple[Verdict, ...]
    runs: tuple[dict[str, Any], ...]
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "command": "simtrain validate quality",
            "environment": asdict(self.environment),
            "band": BAND,
            "verdicts": [asdict(v) for v in self.verdicts],
            "runs": list(self.runs),
        }

    def __str__(self) -> str:
        lines = [f"{'task':<8}{'component':<23}{'baseline':>9}{'difference':>12}{'90 % interval':>22}{'seeds':>7}{'CPU':>7}  verdict"]
        for v in self.verdicts:
            more = f" (about {v.seeds_needed} seeds would tell equivalence)" if v.verdict == "not told" and v.seeds_needed else ""
            interval = f"{v.low:+.2%} to {v.high:+.2%}"
            lines.append(
                f"{v.task:<8}{v.component:<23}{v.baseline:>9.4f}{v.difference:>+12.2%}{interval:>22}{v.seeds:>7}{v.cpu_share:>+7.0%}"
                f"  {v.verdict}{more}"
            )
        lines.append(f"equivalent: within {BAND:.1%} by two one-sided t-tests on pairs; digits: accuracy, text: loss; above zero is better")
        return "\n".join(lines)


def compare_quality(seeds: dict[str, int] | None = None, progress: Progress | None = None) -> QualityReport:
    """Trains every component and the baseline with every seed on this machine, one process per core.

    Args:
        seeds: How many by task.
        progress: Told about each finished training.

    Raises:
        InputError: PyTorch or scikit-learn is not installed.
        MeasurementError: A training failed.
    """
    here, wanted = environment(), SEEDS if seeds is None else seeds
    requests = [{"task": task, "seed": s, "components": [BASELINE, *COMPONENTS]} for task, count in wanted.items() for s in range(count)]
    runs: list[dict[str, Any]] = []
    with ThreadPoolExecutor(here.cores) as pool:
        for rows in pool.map(_train, requests):
            runs += rows
            if progress:
                progress(f"{rows[0]['task']}, seed {rows[0]['seed']}: " + ", ".join(f"{r['component']} {r['quality']:.4f}" for r in rows))
    verdicts = tuple(_verdict(task, component, runs) for task in wanted for component in COMPONENTS)
    return QualityReport(verdicts, tuple(runs), here)


def _train(request: dict[str, Any]) -> list[dict[str, Any]]:
    command = [sys.executable, "-P", "-W", "ignore", "-m", "validation.quality_worker"]
    variables = os.environ | dict.fromkeys(THREAD_ENVIRONMENT, "1")
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=variables, check=False)
    if "No module named 'sklearn'" in done.stderr:
        raise InputError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    if done.returncode != 0:
        raise MeasurementError(f"training {request['task']} failed: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _verdict(task: str, component: str, runs: Sequence[dict[str, Any]]) -> Verdict:
    by_key = {(r["component"], r["seed"]): r for r in runs if r["task"] == task}
    pairs = [(by_key[BASELINE, seed], row) for (name, seed), row in by_key.items() if name == component]
    if task == "digits":
        differences = [row["quality"] - base["quality"] for base, row in pairs]
    else:
        differences = [1 - row["quality"] / base["quality"] for base, row in pairs]
    low, high, verdict, needed = judge(differences)
    return Verdict(
        task=task,
        component=component,
        baseline=float(np.mean([base["quality"] for base, _ in pairs])),
        difference=float(np.mean(differences)),
        low=low,
        high=high,
        seeds=len(pairs),
        verdict=verdict,
        seeds_needed=needed,
        cpu_share=sum(row["cpu_s"] for _, row in pairs) / sum(base["cpu_s"] for base, _ in pairs) - 1,
    )
