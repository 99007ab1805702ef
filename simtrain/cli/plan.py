"""`simtrain plan`: the best strategies for a global batch, and why the others fail."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from simtrain.cli.files import check_outputs, write_files, write_report
from simtrain.cli.options import (
    ClusterOption,
    JsonOption,
    MemoryMarginOption,
    MemoryPlotOption,
    Objective,
    OptimizerOption,
    ReportOption,
    SeqLenOption,
    TimelineOption,
    TraceOption,
    WorkloadArgument,
    read_pairs,
)
from simtrain.cli.output import note, write_json, write_table
from simtrain.cli.predict import EXIT_DOES_NOT_FIT
from simtrain.cli.progress import SlowProgress
from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.strategy import Strategy
from simtrain.core.units import parse_quantity

if TYPE_CHECKING:
    from pathlib import Path

    from simtrain.core.hardware import Cluster
    from simtrain.core.workload import Workload
    from simtrain.planner.launchers import Job
    from simtrain.planner.search import Plan

DEFAULT_TOP = 10


def plan(
    workload: WorkloadArgument,
    *,
    cluster: ClusterOption,
    global_batch: Annotated[list[int], typer.Option("--global-batch", min=1, help="Samples per optimizer update; repeat to choose from.")],
    objective: Annotated[list[Objective] | None, typer.Option("--objective", help="What to rank by; repeat for a Pareto front.")] = None,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", help="Allowed; repeat for several. What is customary by default.")
    ] = None,
    checkpoint: Annotated[list[str] | None, typer.Option("--checkpoint", help="Allowed; repeat for several.")] = None,
    zero: Annotated[list[int] | None, typer.Option("--zero", help="Allowed ZeRO stages; repeat for several.")] = None,
    optimizer: OptimizerOption = "adamw",
    runtime: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="The framework, such as megatron; repeat to choose from. What makes sense by default."),
    ] = None,
    fixed: Annotated[str, typer.Option("--fixed", help="Choices that are settled: 'tensor=8,micro_batch=1'.")] = "",
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="How many to use; all by default.")] = None,
    memory_risk: Annotated[float, typer.Option("--memory-risk", help="Highest probability of running out of memory, such as 0.05.")] = 0.0,
    memory_margin: MemoryMarginOption = 0.0,
    power: Annotated[float, typer.Option("--power", help="Most average power, in W.")] = 0.0,
    budget: Annotated[float, typer.Option("--budget", help="Most money, in USD, for --tokens.")] = 0.0,
    tokens: Annotated[float, typer.Option("--tokens", help="Length of the training, for --budget and --deadline.")] = 0.0,
    deadline: Annotated[str, typer.Option("--deadline", help="Most time for --tokens, such as '30 d'.")] = "",
    robust: Annotated[str, typer.Option("--robust", help="Choose by 'expected' or 'worst_decile' under errors of the model.")] = "",
    jitter: Annotated[float, typer.Option("--jitter", help="Relative standard deviation of compute, for --robust.")] = 0.0,
    weights: Annotated[str, typer.Option("--weights", help="Of the balanced score: 'throughput=0.5,memory=0.3,convergence=0.2'.")] = "",
    patience: Annotated[float, typer.Option("--patience", min=0.0, help="Seconds after which the search stops and says so.")] = 40.0,
    explain: Annotated[bool, typer.Option("--why/--no-why", help="What bounds the best, and what would change it.")] = True,
    emit: Annotated[str | None, typer.Option("--emit", help="Print the best for a launcher: megatron, torchtitan, deepspeed ...")] = None,
    seq_len: SeqLenOption = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="How many to print; 10 in the table, all with --json.")] = None,
    timeline: TimelineOption = None,
    memory_plot: MemoryPlotOption = None,
    trace: TraceOption = None,
    report: ReportOption = None,
    json: JsonOption = False,
) -> None:
    """Search the strategies for a global batch and rank them."""
    from simtrain.planner import search
    from simtrain.planner.launchers import Job, check_launcher, runtimes_of
    from simtrain.planner.objectives import Limits
    from simtrain.planner.space import blocks_of, default_runtimes

    check_outputs(timeline=timeline, memory_plot=memory_plot, trace=trace, report=report)
    if emit is not None:
        check_launcher(emit, "--emit")
    what, where = catalog.workload(workload, seq_len=seq_len), catalog.cluster(cluster)
    with SlowProgress("planning") as progress:
        found = search.plan(
            what,
            where,
            global_batch,
            objective=[o.value for o in objective or [Objective.THROUGHPUT]],
            precisions=precision or None,
            checkpoints=checkpoint or None,
            zeros=tuple(zero) if zero else None,
            optimizer=optimizer,
            runtime=runtime or (runtimes_of(emit, default_runtimes(where, what)) if emit else None),
            fixed=read_pairs(fixed, "--fixed"),
            devices=devices,
            limits=Limits(memory_margin, power, budget, tokens, parse_quantity(deadline, "s") if deadline else 0.0, memory_risk),
            robust=robust.replace("-", "_"),
            jitter=jitter,
            weights={name: _number(value, name) for name, value in read_pairs(weights, "--weights").items()} or None,
            progress=progress,
            patience_s=patience,
            explain=explain and emit is None,
        )
    if emit is not None:
        _emit(found, emit, Job(min(len(node.devices) for node in where.nodes), blocks_of(what)))
    else:
        _print(found, top, json=json)
    if timeline or memory_plot or trace:
        _draw(found, what, where, timeline, memory_plot, trace)
    write_report(found, report)
    if not found.ranked:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _draw(found: Plan, workload: Workload, cluster: Cluster, timeline: Path | None, memory: Path | None, trace: Path | None) -> None:
    """Writes files of the best step, read by `schedule` where it was not read with its events."""
    from simtrain.step.predict import schedule

    if found.best is not None:
        best = found.best
        full = best if best.events else schedule(workload, cluster, best.strategy, runtime=best.runtime)
        write_files(full, timeline=timeline, memory=memory, trace=trace)


def _print(found: Plan, top: int | None, *, json: bool) -> None:
    if json:
        data = found.to_dict()
        write_json(data | {"ranked": data["ranked"][:top]})
        return
    from simtrain.report import plan_table

    write_table(plan_table(found, top=top or DEFAULT_TOP))


def _emit(found: Plan, launcher: str, job: Job) -> None:
    """Writes the best strategy in a launcher's own form on standard output, what that cannot say on standard error."""
    from simtrain.core.runtimes import runtime
    from simtrain.planner.launchers import CARRIED, emit

    if found.best is None:
        note("nothing fits, so that there is nothing to emit; the same command without --emit says why")
        return
    planned = found.best.runtime
    written = emit(launcher, Strategy.parse(found.best.strategy), replace(job, runtime=runtime(planned)))
    sys.stdout.write(written.text)
    if not found.complete:
        note(f"NOT COMPLETE: {found.unread} strategies were not looked at, a better one may be among them (--patience)")
    if planned not in CARRIED[launcher]:
        note(f"planned under {planned}, which is not what {launcher} starts: the step will take another time than predicted")
    for line in written.left_out:
        note(f"not said in it: {line}")


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--weights: {name} must be a number, not {text!r}") from None
