"""`simtrain compare`: two strategies side by side, and where their difference comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from simtrain.cli.files import PAGES, check_path, write_report
from simtrain.cli.options import ClusterOption, JsonOption, ReportOption, RuntimeOption, SeqLenOption, WorkloadArgument, read_strategy
from simtrain.cli.output import write_json, write_table
from simtrain.core import catalog


def compare(
    workload: WorkloadArgument,
    *,
    cluster: ClusterOption,
    strategy: Annotated[str, typer.Option("--strategy", help="The first: 'data=4,micro_batch=4', or a .toml file.")],
    against: Annotated[str, typer.Option("--against", help="The second.")],
    runtime: RuntimeOption = None,
    against_runtime: Annotated[str | None, typer.Option("--against-runtime", help="Of the second; the first's by default.")] = None,
    against_cluster: Annotated[str | None, typer.Option("--against-cluster", help="Of the second; the first's by default.")] = None,
    seq_len: SeqLenOption = None,
    report: ReportOption = None,
    json: JsonOption = False,
) -> None:
    """Split the difference of two predictions: time by part, memory by kind."""
    from simtrain.planner.why import compare as split
    from simtrain.step.predict import schedule

    check_path("--report", report, PAGES)
    what, where = catalog.workload(workload, seq_len=seq_len), catalog.cluster(cluster)
    there = catalog.cluster(against_cluster) if against_cluster else where
    found = split(
        schedule(what, where, read_strategy(strategy), runtime=runtime),
        schedule(what, there, read_strategy(against), runtime=against_runtime or runtime),
    )
    if json:
        write_json(found.to_dict())
    else:
        from simtrain.report.sweeps import comparison_table

        write_table(comparison_table(found))
    write_report(found, report)
