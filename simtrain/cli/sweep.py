"""`simtrain sweep`: a grid of settings as a table, in parallel and resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simtrain.cli.files import check_path
from simtrain.cli.options import ClusterOption, JsonOption, Reader, RuntimeOption, WorkloadArgument
from simtrain.cli.output import note, write_json, write_table
from simtrain.cli.progress import SlowProgress
from simtrain.core.errors import InputError


def sweep(
    workload: WorkloadArgument,
    *,
    cluster: ClusterOption,
    grid: Annotated[list[str], typer.Option("--grid", help="A field and its values: 'micro_batch=1,2,4'; repeat for more fields.")],
    strategy: Annotated[str, typer.Option("--strategy", help="What does not vary: 'data=4,precision=bf16-amp'.")] = "data=1",
    reader: Annotated[Reader, typer.Option("--reader", help="From fast to full.")] = Reader.SCHEDULE,
    runtime: RuntimeOption = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes.")] = 1,
    scheduler: Annotated[str, typer.Option("--scheduler", help="A Dask scheduler, such as tcp://host:8786.")] = "",
    cache: Annotated[Path | None, typer.Option("--cache", help="Where finished points are kept; the user's cache by default.")] = None,
    fresh: Annotated[bool, typer.Option("--no-cache", help="Neither take nor keep finished points.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write all columns to this file.")] = None,
    json: JsonOption = False,
) -> None:
    """Predict a grid of settings, one row each."""
    from simtrain.planner.sweep import read_points, sweep_rows, to_frame

    check_path("--csv", csv)
    points = read_points(workload, cluster, read_grid(grid), strategy=strategy, runtime=runtime, reader=reader.value)
    done = [0]

    with SlowProgress("sweeping") as bar:

        def progress(now: int, total: int) -> None:
            done[0] = now
            bar(now, total)

        try:
            rows = sweep_rows(points, jobs=jobs, scheduler=scheduler, cache=False if fresh else cache or True, progress=progress)
        except KeyboardInterrupt:
            kept = "not kept (--no-cache)" if fresh else "kept: the same command resumes there"
            note(f"{done[0]} of {len(points)} points are finished and {kept}")
            raise
    if csv is not None:
        try:
            to_frame(rows).to_csv(csv, index=False)
        except OSError as error:
            raise InputError(f"cannot write {csv}: {error.strerror or error}") from None
        note(f"wrote {csv}")
    if json:
        write_json({"rows": rows})
    else:
        from simtrain.report.sweeps import sweep_table

        write_table(sweep_table(rows))


def read_grid(pairs: list[str]) -> dict[str, list[str]]:
    """Reads `["micro_batch=1,2", "checkpoint=none,full"]`.

    Raises:
        InputError: Not of that form, or a field given twice.
    """
    grid: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, values = pair.partition("=")
        listed = [v.strip() for v in values.split(",") if v.strip()]
        if not equals or not listed:
            raise InputError(f"--grid {pair!r}: expected a field and its values, such as micro_batch=1,2,4")
        if name.strip() in grid:
            raise InputError(f"--grid: {name.strip()} is given twice")
        grid[name.strip()] = listed
    return grid
