"""The proposal's table for people: claims beside predictions, the ablation, and what small real runs said of quality."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from validation.proposal import CLAIMS, COMPONENTS, JOBS, JobTable, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURED_AS = {
    ("dynamic batch",): "dynamic-batch-samples",
    ("precision",): "bf16-amp",
    ("checkpointing",): "checkpoint",
    ("learning rate",): "schedule",
    COMPONENTS: "all",
}
"""Which small real run belongs to which components."""


@dataclass(frozen=True, slots=True)
class ProposalReport:
    """Tables of all jobs, with the newest quality runs.

    Attributes:
        jobs: One for each architecture.
        cluster: On which they were predicted.
        quality: Verdicts by task and component, as `simtrain validate quality` saved them.
        measured: File of these runs, or what is missing.
    """

    jobs: tuple[JobTable, ...]
    cluster: str
    quality: Mapping[tuple[str, str], Mapping[str, Any]]
    measured: str

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        rows = [dict(verdict) for verdict in self.quality.values()]
        return {
            "command": "simtrain validate proposal",
            "cluster": self.cluster,
            "claims": CLAIMS,
            "jobs": [j.to_dict() for j in self.jobs],
            "quality": rows,
        }

    def __str__(self) -> str:
        return "\n\n".join([*(self._job(job) for job in self.jobs), self._notes()])

    def _job(self, job: JobTable) -> str:
        base, whole = job.find(), job.find(*COMPONENTS)
        low, high = job.ranges[whole.components]
        claims = [
            ("claim", "predicted"),
            (CLAIMS["time"], f"{job.saved(whole):.0%} less ({low:.0%} to {high:.0%} if the noise scale is 3 times smaller or larger)"),
            (
                CLAIMS["memory"],
                f"{_change(whole.equal_memory_bytes / base.equal_memory_bytes)} at equal micro-batch; over the run, with larger ones, "
                f"{_change(whole.memory_bytes / base.memory_bytes)} ({_gib(base)} to {_gib(whole)} GiB)",
            ),
            (CLAIMS["throughput"], _change(whole.throughput / base.throughput)),
            (CLAIMS["scaling"], "; ".join(f"{board}: {first:.1%} to {all_:.1%}" for board, (first, all_) in job.scaling.items())),
            (CLAIMS["quality"], self._quality(job, whole.components) or "not predicted"),
        ]
        lines = [f"{job.job} on {self.cluster}: baseline {JOBS[job.job].baseline}", *(f"  {claim:<38}{text}" for claim, text in claims)]
        lines += ["", f"  {'components':<58}{'time saved':>11}{'range':>15}{'samples/s':>11}{'GiB':>7}{'scaling':>9}{'batch':>11}"]
        lines += [self._row(job, v) for v in job.variants]
        pairs = [f"{a} x {b} {value:+.0%}" for (a, b), value in job.interactions.items() if abs(value) >= 0.005]
        lines.append(f"  pairs, time of both over what each alone makes (below zero they help each other): {', '.join(pairs) or 'none'}")
        return "\n".join([*lines, f"  noise scale: {job.noise_source}"])

    def _row(self, job: JobTable, variant: Variant) -> str:
        low, high = job.ranges[variant.components]
        batch = f"{variant.first_batch}" + (f"-{variant.last_batch}" if variant.last_batch != variant.first_batch else "")
        name = " + ".join(variant.components) or "baseline"
        quality = self._quality(job, variant.components)
        return (
            f"  {name:<58}{job.saved(variant):>+11.1%}{f'{low:+.0%} to {high:+.0%}':>15}{variant.throughput:>11.4g}{_gib(variant):>7}"
            f"{variant.scaling:>9.1%}{batch:>11}" + (f"  {quality}" if quality else "")
        )

    def _quality(self, job: JobTable, components: tuple[str, ...]) -> str:
        found = self.quality.get((JOBS[job.job].task, MEASURED_AS.get(components, "")))
        if found is None:
            return ""
        return f"measured small ({found['task']}): {found['difference']:+.2%}, {found['verdict']}"

    def _notes(self) -> str:
        return (
            "time saved counts the same target; warm-up and decay are in no law and change no step here. Learning rate means that it grows "
            "with the batch: where it is kept, a larger batch hardly goes further in a step, so a dynamic batch alone stays small. "
            f"Quality is measured on small models ({self.measured}); above zero is better."
        )


def make_report(jobs: Sequence[JobTable], cluster: str) -> ProposalReport:
    """Puts predictions beside the newest saved quality runs.

    Args:
        jobs: As predicted.
        cluster: On which.
    """
    saved = sorted(f.name for f in files("validation").joinpath("measured").iterdir() if f.name.startswith("quality_"))
    if not saved:
        return ProposalReport(tuple(jobs), cluster, {}, "none saved: run simtrain validate quality")
    data = json.loads(files("validation").joinpath("measured", saved[-1]).read_text(encoding="utf-8"))
    return ProposalReport(tuple(jobs), cluster, {(v["task"], v["component"]): v for v in data["verdicts"]}, saved[-1])


def plot_ablation(report: ProposalReport, ax: Axes) -> Axes:
    """Draws the time saved by each component alone, by all but it, and by all together, for each architecture.

    Args:
        report: What is drawn.
        ax: Where.
    """
    names = [*COMPONENTS, "all"]
    width = 0.8 / (2 * len(report.jobs))
    colours = ["#4a86b8", "#e07b39", "#5f9e6e"]
    for i, job in enumerate(report.jobs):
        whole = job.find(*COMPONENTS)
        alone = [*(job.find(c) for c in COMPONENTS), whole]
        without = [job.without(c) for c in COMPONENTS]
        for half, (variants, alpha, label) in enumerate(((alone, 1.0, "alone"), (without, 0.45, "all but it"))):
            at = np.arange(len(variants)) + (2 * i + half - len(report.jobs) + 0.5) * width
            saved = np.array([job.saved(v) for v in variants])
            ends = np.array([job.ranges[v.components] for v in variants]).T
            error = np.maximum(np.abs(ends - saved), 0)
            ax.bar(at, 100 * saved, width, color=colours[i % len(colours)], alpha=alpha, label=f"{job.job}, {label}")
            ax.errorbar(at, 100 * saved, yerr=100 * error, fmt="none", ecolor="#444444", elinewidth=0.9, capsize=2)
    ax.axhspan(23, 28, color="#b23a48", alpha=0.15, label="claimed for all together")
    ax.axhline(0, color="#444444", linewidth=0.8)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("time to target saved (%)")
    ax.set_title(f"Predicted on {report.cluster}; bars end where the noise scale is three times smaller or larger", fontsize=10)
    ax.legend(fontsize=8, frameon=False, ncols=2)
    return ax


def _change(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%} {'less' if ratio < 1 else 'more'}"


def _gib(variant: Variant) -> str:
    return f"{variant.memory_bytes / 2**30:.1f}"
