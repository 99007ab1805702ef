"""`simtrain plan`: the best strategies for a global batch, and why the others fail."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from simtrain.cli.files import PICTURES, TRACES, check_path, write_files
from simtrain.cli.options import (
    ClusterOption,
    JsonOption,
    MemoryPlotOption,
    Objective,
    RuntimeOption,
    SeqLenOption,
    TimelineOption,
    TraceOption,
    WorkloadArgument,
)
from simtrain.cli.output import write_json, write_table
from simtrain.cli.predict import EXIT_DOES_NOT_FIT
from simtrain.core import catalog

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DEFAULT_TOP = 10
PATIENCE_S = 2.0


def plan(
    workload: WorkloadArgument,
    *,
    cluster: ClusterOption,
    global_batch: Annotated[int, typer.Option("--global-batch", min=1, help="Samples per optimizer update.")],
    objective: Annotated[Objective, typer.Option("--objective", help="What to rank by.")] = Objective.THROUGHPUT,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", help="Allowed; repeat for several. All that fit by default.")
    ] = None,
    checkpoint: Annotated[list[str] | None, typer.Option("--checkpoint", help="Allowed; repeat for several.")] = None,
    zero: Annotated[list[int] | None, typer.Option("--zero", help="Allowed ZeRO stages; repeat for several. 0 and 1 by default.")] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, adam, sgd or sgd-momentum.")] = "adamw",
    runtime: RuntimeOption = None,
    seq_len: SeqLenOption = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="How many to print; 10 in the table, all with --json.")] = None,
    timeline: TimelineOption = None,
    memory_plot: MemoryPlotOption = None,
    trace: TraceOption = None,
    json: JsonOption = False,
) -> None:
    """Search the strategies for a global batch and rank them."""
    from simtrain.planner import search
    from simtrain.step.predict import schedule

    check_path("--timeline", timeline, PICTURES)
    check_path("--memory-plot", memory_plot, PICTURES)
    check_path("--trace", trace, TRACES)
    what, where = catalog.workload(workload, seq_len=seq_len), catalog.cluster(cluster)
    with SlowProgress("planning") as progress:
        found = search.plan(
            what,
            where,
            global_batch,
            objective=objective.value,
            precisions=precision or None,
            checkpoints=checkpoint or None,
            zeros=tuple(zero) if zero else (0, 1),
            optimizer=optimizer,
            runtime=runtime,
            progress=progress,
        )
    if json:
        data = found.to_dict()
        write_json(data | {"ranked": data["ranked"][:top]})
    else:
        from simtrain.report import plan_table

        write_table(plan_table(found, top=top or DEFAULT_TOP))
    if found.ranked and (timeline or memory_plot or trace):
        best = found.ranked[0]
        full = best if best.events else schedule(what, where, best.strategy, runtime=runtime)
        write_files(full, timeline=timeline, memory=memory_plot, trace=trace)
    if not found.ranked:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


class SlowProgress:
    """A progress bar on standard error that appears only on a terminal, and only when it takes longer than `PATIENCE_S`.

    Args:
        label: What is going on.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._start_s = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        """Moves the bar; `search.plan` calls this."""
        if self._bar is None and sys.stderr.isatty() and time.monotonic() - self._start_s > PATIENCE_S:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
