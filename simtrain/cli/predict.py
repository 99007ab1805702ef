"""`simtrain predict`: one strategy on one cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from simtrain.cli.files import check_outputs, write_files, write_report
from simtrain.cli.options import (
    ClusterOption,
    JsonOption,
    MemoryPlotOption,
    Reader,
    ReportOption,
    RuntimeOption,
    SeqLenOption,
    StrategyOption,
    TimelineOption,
    TraceOption,
    WorkloadArgument,
    read_stragglers,
    read_strategy,
)
from simtrain.cli.output import write_json, write_table
from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.strategy import Strategy

if TYPE_CHECKING:
    from pathlib import Path

    from simtrain.core.hardware import Cluster
    from simtrain.core.result import Result
    from simtrain.core.workload import Workload

EXIT_DOES_NOT_FIT = 1


def predict(
    workload: WorkloadArgument,
    *,
    cluster: ClusterOption,
    strategy: StrategyOption,
    reader: Annotated[Reader | None, typer.Option("--reader", help="From fast to full; schedule by default.")] = None,
    runtime: RuntimeOption = None,
    seq_len: SeqLenOption = None,
    speed_spread: Annotated[
        float | None, typer.Option("--speed-spread", help="How much boards of a kind differ; 0 for not at all.")
    ] = None,
    jitter: Annotated[float, typer.Option("--jitter", min=0.0, help="Relative standard deviation of compute (simulate).")] = 0.0,
    straggler: Annotated[list[str] | None, typer.Option("--straggler", metavar="RANK=FACTOR", help="A slow rank (simulate).")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the jitter (simulate).")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps to simulate (simulate).")] = None,
    timeline: TimelineOption = None,
    memory_plot: MemoryPlotOption = None,
    trace: TraceOption = None,
    report: ReportOption = None,
    json: JsonOption = False,
) -> None:
    """Predict step time, memory, energy and cost of a strategy."""
    check_outputs(timeline=timeline, memory_plot=memory_plot, trace=trace, report=report)
    how = read_strategy(strategy)
    dynamics: dict[str, Any] = {"jitter": jitter or None, "stragglers": read_stragglers(straggler or [], how.ranks) or None}
    dynamics |= {"seed": seed, "steps": steps}
    dynamics = {name: value for name, value in dynamics.items() if value is not None}
    chosen = _choose_reader(reader, tuple(dynamics), files=(timeline, memory_plot, trace))
    what, where = catalog.workload(workload, seq_len=seq_len), catalog.cluster(cluster)
    where = where if speed_spread is None else where.with_speed_spread(speed_spread)
    result = _read(chosen, what, where, how, runtime=runtime, **dynamics)
    if json:
        write_json(result.to_dict())
    else:
        from simtrain.report import result_table

        write_table(result_table(result))
        if not result.fits:
            _write_changes(what, where, how, runtime)
    write_files(result, timeline=timeline, memory=memory_plot, trace=trace)
    write_report(result, report)
    if not result.fits:
        if not json and how.offload == "none" and (hint := _hint(what, where, how, runtime)):
            typer.echo(hint)
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _hint(workload: Workload, cluster: Cluster, strategy: Strategy, runtime: str | None) -> str:
    from simtrain.step.offload_hint import offload_hint

    return offload_hint(workload, cluster, strategy, runtime=runtime)


def _write_changes(workload: Workload, cluster: Cluster, strategy: Strategy, runtime: str | None) -> None:
    """Says with which change it would fit; nothing of replicas stated in full."""
    from simtrain.planner.fitting import smallest_changes
    from simtrain.report.sweeps import changes_table
    from simtrain.step.setting import resolve

    if not strategy.plan:
        chosen = resolve(workload, cluster, strategy, runtime).runtime
        write_table(changes_table(smallest_changes(workload, cluster, strategy, chosen)))


def _choose_reader(reader: Reader | None, dynamics: tuple[str, ...], files: tuple[Path | None, ...]) -> Reader:
    """Takes the reader asked for, else the fastest that can do what is asked.

    Raises:
        InputError: The reader asked for cannot.
    """
    if dynamics and reader not in (None, Reader.SIMULATE):
        options = ", ".join(f"--{name.removesuffix('s') if name == 'stragglers' else name}" for name in dynamics)
        raise InputError(f"{options} needs --reader simulate, not {reader}")
    if reader is Reader.ESTIMATE and any(files):
        raise InputError("the reader estimate keeps no timeline to plot or trace: use --reader schedule or simulate")
    return reader or (Reader.SIMULATE if dynamics else Reader.SCHEDULE)


def _read(reader: Reader, workload: Workload, cluster: Cluster, strategy: Strategy, *, runtime: str | None, **dynamics: Any) -> Result:
    from simtrain.step import predict as readers

    if reader is Reader.SIMULATE:
        return readers.simulate(workload, cluster, strategy, runtime=runtime, **dynamics)
    read = readers.estimate if reader is Reader.ESTIMATE else readers.schedule
    return read(workload, cluster, strategy, runtime=runtime)
