"""The proposal's table for real: every component alone, left out, and together, with paired seeds, on the cards (or cores) at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtrain.core.errors import InputError, UnknownNameError
from validation.measure import MeasurementError, Progress, environment
from validation.measurement import Environment
from validation.proposal import COMPONENTS, JOBS
from validation.proposal_data import READERS
from validation.quality import judge

VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    *((c,) for c in COMPONENTS),
    *(tuple(o for o in COMPONENTS if o != c) for c in COMPONENTS),
    COMPONENTS,
)
SEEDS, EPOCHS = 5, {"resnet50-cifar10": 30, "gpt2-wikitext2": 5}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    Attributes:
        seeds: Pairs.
        epochs: Passes over the data; by default those of `EPOCHS`.
        processes: Ranks; each has a card where there are cards.
        options: Of the model, to make it smaller.
        micro_batch: Samples per rank; the baseline's by default.
        max_batch: That a dynamic batch may reach; the job's by default.
    """

    seeds: int = SEEDS
    epochs: float | None = None
    processes: int = 4
    options: Mapping[str, Any] | None = None
    micro_batch: int | None = None
    max_batch: int | None = None

    def __post_init__(self) -> None:
        if self.seeds < 3:
            raise InputError(f"{self.seeds} seeds tell nothing about quality: run three or more")
        if self.processes < 1 or (self.epochs is not None and not self.epochs > 0):
            raise InputError(f"processes ({self.processes}) are 1 or more, and epochs ({self.epochs}) above zero")


@dataclass(frozen=True, slots=True)
class MeasuredVariant:
    """A combination beside the baseline, over paired seeds.

    Attributes:
        components: That are on.
        time_saved: Mean share of the time until the baseline's final quality less the band; `None` where some seed never reached it.
        throughput: Samples per second, mean.
        peak_bytes: On a card, largest; `None` without cards.
        difference: Mean of the paired differences of final quality, above zero is better.
        low: Of the interval that holds the mean difference with 90 % confidence.
        high: Likewise.
        verdict: "equivalent", "better", "worse" or "not told".
        seeds_needed: Pairs that would tell equivalence, if any number would.
    """

    components: tuple[str, ...]
    time_saved: float | None
    throughput: float
    peak_bytes: int | None
    difference: float
    low: float
    high: float
    verdict: str
    seeds_needed: int | None


@dataclass(frozen=True, slots=True)
class MeasuredJob:
    """One architecture, trained for real.

    Attributes:
        job: Name.
        variants: The baseline first.
        scaling: Throughput of all ranks over that of one times their number, baseline and all together; `None` with one rank.
        runs: What every training reported.
        environment: Where and when.
    """

    job: str
    variants: tuple[MeasuredVariant, ...]
    scaling: tuple[float, float] | None
    runs: tuple[dict[str, Any], ...]
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self) | {"command": "simtrain validate proposal --run"}

    def __str__(self) -> str:
        lines = [f"{self.job}, measured", f"  {'components':<58}{'time saved':>11}{'samples/s':>11}{'GiB':>7}{'quality':>9}  verdict"]
        for v in self.variants:
            saved = "never" if v.time_saved is None else f"{v.time_saved:+.1%}"
            peak = "-" if v.peak_bytes is None else f"{v.peak_bytes / 2**30:.1f}"
            more = f" (about {v.seeds_needed} seeds would tell equivalence)" if v.verdict == "not told" and v.seeds_needed else ""
            name = " + ".join(v.components) or "baseline"
            lines.append(f"  {name:<58}{saved:>11}{v.throughput:>11.4g}{peak:>7}{v.difference:>+9.2%}  {v.verdict}{more}")
        if self.scaling:
            lines.append(f"  scaling: baseline {self.scaling[0]:.1%}, all together {self.scaling[1]:.1%}")
        return "\n".join(lines)


def run_job(name: str, folder: Path, plan: Plan | None = None, progress: Progress | None = None) -> MeasuredJob:
    """Trains every variant with every seed, one after the other, and judges them in pairs.

    Args:
        name: One of `JOBS`.
        folder: With its data set, as distributed.
        plan: How much.
        progress: Told about each finished training.

    Raises:
        UnknownNameError: No such job.
        InputError: The data cannot be read.
        MeasurementError: A training failed.
    """
    if name not in JOBS:
        raise UnknownNameError("job", name, JOBS)
    plan = plan or Plan()
    data = READERS[name](folder)  # bad files are found before hours are spent
    runs = []
    for seed in range(plan.seeds):
        for components in VARIANTS:
            runs.append(_train(_request(name, folder, data, plan, seed, components), plan.processes))
            if progress:
                progress(
                    f"seed {seed}, {' + '.join(components) or 'baseline'}: quality {runs[-1]['quality']:.4f}, {runs[-1]['time_s']:.4g} s"
                )
    scaling = None
    if plan.processes > 1:
        alone = [_train(_request(name, folder, data, plan, 0, c), 1) for c in ((), COMPONENTS)]
        together = [next(r for r in runs if tuple(r["components"]) == c) for c in ((), COMPONENTS)]
        first, all_ = (_throughput(m) / _throughput(o) / plan.processes for m, o in zip(together, alone, strict=True))
        scaling = (first, all_)
    return MeasuredJob(name, tuple(_judged(name, c, runs) for c in VARIANTS), scaling, tuple(runs), environment())


def _request(name: str, folder: Path, data: Any, plan: Plan, seed: int, components: Sequence[str]) -> dict[str, Any]:
    job = JOBS[name]
    options = dict(plan.options or {})
    size = len(data.train[0]) if name == "resnet50-cifar10" else len(data.train) // options.get("max_positions", 1024)
    micro = plan.micro_batch or job.baseline.micro_batch
    return {
        "job": name,
        "folder": str(folder),
        "seed": seed,
        "components": list(components),
        "micro_batch": micro,
        "micro_batches": [micro],  # measured prices never speak of a micro-batch that never ran
        "max_batch": plan.max_batch or job.max_batch,
        "samples": max(1, round((plan.epochs or EPOCHS[name]) * size)),
        "options": options,
    }


def _train(request: dict[str, Any], processes: int) -> dict[str, Any]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "validation.proposal_worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise MeasurementError(f"training {request['job']} failed: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _throughput(run: Mapping[str, Any]) -> float:
    return float(run["samples"] / run["time_s"])


def _judged(name: str, components: tuple[str, ...], runs: Sequence[Mapping[str, Any]]) -> MeasuredVariant:
    pairs = [
        (base, run)
        for base in runs
        for run in runs
        if not base["components"] and tuple(run["components"]) == components and run["seed"] == base["seed"]
    ]
    accuracy = name == "resnet50-cifar10"
    differences = [r["quality"] - b["quality"] if accuracy else 1 - r["quality"] / b["quality"] for b, r in pairs]
    low, high, verdict, needed = judge(differences)
    saved = [_saved(b, r, accuracy=accuracy) for b, r in pairs]
    told = [s for s in saved if s is not None]
    peaks = [r["peak_bytes"] for _, r in pairs if r["peak_bytes"] is not None]
    return MeasuredVariant(
        components=components,
        time_saved=float(np.mean(told)) if len(told) == len(saved) else None,
        throughput=float(np.mean([_throughput(r) for _, r in pairs])),
        peak_bytes=max(peaks) if peaks else None,
        difference=float(np.mean(differences)),
        low=low,
        high=high,
        verdict=verdict,
        seeds_needed=needed,
    )


def _saved(base: Mapping[str, Any], run: Mapping[str, Any], *, accuracy: bool) -> float | None:
    """Share of the time saved until the baseline's last quality, less the band that counts as equal."""
    target = base["quality"] - 0.005 if accuracy else base["quality"] * 1.005

    def reached(curve: Sequence[Sequence[float]]) -> float | None:
        return next((at_s for at_s, _, quality in curve if (quality >= target if accuracy else quality <= target)), None)

    first, second = reached(base["curve"]), reached(run["curve"])
    return None if first is None or second is None else 1 - second / first
