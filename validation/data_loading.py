"""Real `torch.utils.data.DataLoader`s beside their predictions, by number of workers.

A prediction is made from parts measured alone: CPU time of a sample (its `__getitem__`, for workers in a process that waits between
batches: that finds its caches cold), CPU time of the step, and what the loader itself takes per batch as a line in the batch's bytes, from
data sets that cost nothing. Nothing is fitted to a run with the data set at hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.units import format_time
from simtrain.run.data import Loader, feed
from simtrain.run.data_simulation import simulate_loading
from validation.errors import ErrorSummary, skill, summarise
from validation.measure import THREAD_ENVIRONMENT, MeasurementError, Progress, environment
from validation.measurement import Environment

CALIBRATION_BYTES = (65_536, 1_048_576, 4_194_304, 12_582_912)
WORKERS = (0, 1, 2, 4)
MEASURED_S = 1.2
"""A measurement lasts about so long."""
QUIET = 0.05
"""Share of the cores' time that other processes may take for a wall time to count; CPU times always do."""


@dataclass(frozen=True, slots=True)
class Case:
    """A data set and a step.

    Attributes:
        name: Unique.
        side: Pixels of an image, which sets what a sample costs.
        batch: Samples.
        products: Matrix products in a step.
    """

    name: str
    side: int
    batch: int
    products: int


TEST_CASES = (
    Case("icons", 64, 40, 70),
    Case("small", 88, 18, 30),
    Case("light-long-step", 152, 12, 90),
    Case("medium", 136, 10, 20),
    Case("medium-long-step", 112, 24, 200),
    Case("big", 184, 12, 45),
    Case("big-long-step", 224, 8, 150),
    Case("bigger", 272, 6, 30),
)
"""Written before any of them ran, when nothing in the prediction was to be changed any more. Two lists of eight came before (both in
`measured/`): the first showed that parts measured with warm caches are too cheap, the second that a worker's sample must be measured in a
process that waits."""
QUICK_CASES = (TEST_CASES[0], TEST_CASES[3])


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds per batch as a line in its bytes."""

    fixed_s: float
    byte_s: float

    def __call__(self, batch_bytes: float) -> float:
        """Returns the seconds of a batch."""
        return self.fixed_s + self.byte_s * batch_bytes

    @classmethod
    def through(cls, sizes: Sequence[float], times_s: Sequence[float]) -> Line:
        """Fits relative errors by least squares, neither term below zero."""
        from scipy.optimize import nnls

        x, y = np.asarray(sizes, dtype=np.float64), np.asarray(times_s, dtype=np.float64)
        (fixed_s, byte_s), _ = nnls(np.stack([1 / y, x / 1e9 / y], axis=1), np.ones(len(x)))
        return cls(float(fixed_s), float(byte_s) / 1e9)


@dataclass(frozen=True, slots=True)
class LoaderCosts:
    """What the loader takes for a batch, whatever the data.

    Attributes:
        send: CPU time of a worker: collating into shared memory, and sending.
        receive: CPU time of the main process.
        collate: CPU time of the main process that does without workers.
    """

    send: Line
    receive: Line
    collate: Line

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float]]) -> LoaderCosts:
        """Reads the rows of a calibration."""
        sizes = [row["batch_bytes"] for row in rows]
        return cls(*(Line.through(sizes, [row[name] for row in rows]) for name in ("send_s", "receive_s", "collate_s")))


@dataclass(frozen=True, slots=True)
class Row:
    """One loader, predicted and measured; seconds per batch.

    Attributes:
        case: Name.
        workers: Of the loader.
        predicted_s: Period, simulated.
        closed_s: Period, in closed form.
        null_s: The rule of thumb: the step, or all preparation over the workers, whichever is longer; their sum without workers.
        wall_s: Measured period.
        foreign: Share of the cores' time that other processes took meanwhile.
        predicted_main_s: CPU time of the main process.
        main_s: Measured.
        predicted_workers_s: CPU time of all workers.
        workers_s: Measured.
    """

    case: str
    workers: int
    predicted_s: float
    closed_s: float
    null_s: float
    wall_s: float
    foreign: float
    predicted_main_s: float
    main_s: float
    predicted_workers_s: float
    workers_s: float


def predict_row(measured: Mapping[str, Any], case: Case, workers: int, costs: LoaderCosts, cores: int) -> Row:
    """Predicts a loader from its parts and puts the measurement beside it."""
    size, run = measured["batch_bytes"], measured["runs"][str(workers)]
    sample_s = measured["worker_sample_s" if workers else "sample_s"]
    loader = Loader(
        case.batch,
        sample_s,
        workers=workers,
        collate_s=(costs.send if workers else costs.collate)(size),
        receive_s=costs.receive(size) if workers else 0.0,
        cores=cores,
    )
    step_s, prepared_s = measured["step_s"], case.batch * sample_s
    inside = prepared_s + loader.collate_s
    return Row(
        case=case.name,
        workers=workers,
        predicted_s=simulate_loading(loader, step_s).period_s,
        closed_s=feed(loader, step_s).period_s,
        null_s=max(step_s, prepared_s / workers) if workers else step_s + prepared_s,
        wall_s=run["wall_s"],
        foreign=run["foreign"],
        predicted_main_s=step_s + (loader.receive_s if workers else inside),
        main_s=run["main_cpu_s"],
        predicted_workers_s=inside if workers else 0.0,
        workers_s=run["workers_cpu_s"],
    )


@dataclass(frozen=True, slots=True)
class LoadingReport:
    """All loaders with their errors.

    Attributes:
        rows: One for each case and number of workers.
        costs: Of the loader itself.
        environment: Where and when.
    """

    rows: tuple[Row, ...]
    costs: LoaderCosts
    environment: Environment

    def errors(self) -> dict[str, ErrorSummary]:
        """Returns relative errors: of CPU times over all rows, of wall times over those that other processes left alone."""
        quiet = [r for r in self.rows if r.foreign <= QUIET]
        found = {
            "CPU time": [(r.predicted_main_s + r.predicted_workers_s) / (r.main_s + r.workers_s) - 1 for r in self.rows],
            "CPU time, main process": [r.predicted_main_s / r.main_s - 1 for r in self.rows],
            "CPU time, workers": [r.predicted_workers_s / r.workers_s - 1 for r in self.rows if r.workers],
            "wall time": [r.predicted_s / r.wall_s - 1 for r in quiet],
            "wall time, closed form": [r.closed_s / r.wall_s - 1 for r in quiet],
            "wall time, null": [r.null_s / r.wall_s - 1 for r in quiet],
        }
        return {name: summarise(values) for name, values in found.items() if values}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "command": "simtrain validate data",
            "environment": asdict(self.environment),
            "errors": {name: errors.to_dict() for name, errors in self.errors().items()},
            "costs": asdict(self.costs),
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [f"{'':<20}{'':>8}{'period of a step':>24}{'':>9}{'main CPU':>22}{'workers CPU':>22}"]
        lines.append(f"{'case':<20}{'workers':>8}{'predicted':>12}{'measured':>12}{'others':>9}" + f"{'predicted':>11}{'measured':>11}" * 2)
        for r in self.rows:
            times = (r.predicted_main_s, r.main_s, r.predicted_workers_s, r.workers_s)
            lines.append(
                f"{r.case:<20}{r.workers:>8}{format_time(r.predicted_s):>12}{format_time(r.wall_s):>12}{r.foreign:>9.0%}"
                + "".join(f"{format_time(t):>11}" for t in times)
            )
        errors = self.errors()
        lines += [f"{name:<24}{summary}" for name, summary in errors.items()]
        if "wall time" in errors:
            lines.append(f"skill over the null model {skill(errors['wall time'], errors['wall time, null']):.0%}")
        left_out = sum(r.foreign > QUIET for r in self.rows)
        if left_out:
            lines.append(
                f"wall times of {left_out} loaders do not count: other processes took more than {QUIET:.0%} of the cores meanwhile"
            )
        return "\n".join(lines)


def compare_loading(cases: Sequence[Case] = TEST_CASES, progress: Progress | None = None) -> LoadingReport:
    """Measures loaders on this machine and predicts them.

    Args:
        cases: What is loaded.
        progress: Told about each case.

    Raises:
        InputError: No Linux, whose accounts of CPU time are read, or no PyTorch.
        MeasurementError: The measuring process failed.
    """
    if not sys.platform.startswith("linux"):
        raise InputError("CPU times of a loader's workers are read from /proc, which only Linux has")
    here, rows, costs = environment(), [], None
    by_name = {case.name: case for case in cases}
    for answer in _answers(cases):
        if "calibration" in answer:
            costs = LoaderCosts.of(answer["calibration"])
            continue
        if costs is None:
            raise MeasurementError("the measuring process did not begin with its calibration")
        case = by_name[answer["name"]]
        rows += [predict_row(answer, case, workers, costs, here.cores) for workers in WORKERS]
        if progress:
            progress(f"{case.name}: period off by {median(abs(r.predicted_s / r.wall_s - 1) for r in rows[-len(WORKERS) :]):.1%}")
    if costs is None:
        raise MeasurementError("the measuring process said nothing")
    return LoadingReport(tuple(rows), costs, here)


def _answers(cases: Sequence[Case]) -> list[dict[str, Any]]:
    request = {"lasts_s": MEASURED_S, "calibrate": CALIBRATION_BYTES, "cases": [asdict(case) | {"workers": WORKERS} for case in cases]}
    command = [sys.executable, "-P", "-W", "ignore", "-m", "validation.data_worker"]
    variables = os.environ | dict.fromkeys(THREAD_ENVIRONMENT, "1")
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=variables, check=False)
    if done.returncode != 0:
        raise MeasurementError(f"measuring loaders failed: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
