"""`simtrain data`: whether training waits for its input, and what cures it."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from simtrain.cli.options import ClusterOption, JsonOption, RuntimeOption, SeqLenOption, StrategyOption, WorkloadArgument, read_strategy
from simtrain.cli.output import write_json
from simtrain.core import catalog
from simtrain.core.errors import UnsupportedError


def data(
    workload: WorkloadArgument,
    *,
    cluster: ClusterOption,
    strategy: StrategyOption,
    sample_cpu_s: Annotated[
        float, typer.Option("--sample-cpu-s", min=0.0, help="CPU seconds of decoding and augmenting a sample, on one core.")
    ],
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes per rank; 0 prepares between steps.")] = 0,
    prefetch: Annotated[int, typer.Option("--prefetch", min=1, help="Batches under way per worker.")] = 2,
    cores: Annotated[float | None, typer.Option("--cores", help="Of a node; without limit by default.")] = None,
    sample_bytes: Annotated[float, typer.Option("--sample-bytes", min=0.0, help="Of a sample, as stored.")] = 0.0,
    storage_bytes_per_s: Annotated[float | None, typer.Option("--storage-bytes-per-s", help="To all readers together.")] = None,
    storage_nodes: Annotated[int, typer.Option("--storage-nodes", min=1, help="Nodes that read at the same time.")] = 1,
    hit_rate: Annotated[float, typer.Option("--hit-rate", min=0.0, max=1.0, help="Share of samples that a cache holds.")] = 0.0,
    variation: Annotated[float, typer.Option("--variation", min=0.0, help="Relative standard deviation of preparation times.")] = 0.0,
    runtime: RuntimeOption = None,
    seq_len: SeqLenOption = None,
    json: JsonOption = False,
) -> None:
    """Predict whether a step waits for its input: in closed form and simulated, with what would shorten it."""
    from simtrain.run.data import Loader, Storage, feed
    from simtrain.run.data_simulation import simulate_loading
    from simtrain.step.predict import schedule

    machines, how = catalog.cluster(cluster), read_strategy(strategy)
    if how.plan:
        raise UnsupportedError("input is modelled for even replicas: give data=... and micro_batch=... instead of a plan")
    result = schedule(catalog.workload(workload, seq_len=seq_len), machines, how, runtime=runtime)
    loader = Loader(
        result.global_batch // how.data,
        sample_cpu_s,
        read_bytes=sample_bytes,
        workers=workers,
        prefetch=prefetch,
        hit_rate=hit_rate,
        cores=math.inf if cores is None else cores,
        ranks=min(how.data, len(machines.nodes[0].devices)),
        variation=variation,
    )
    storage = Storage(bytes_per_s=math.inf if storage_bytes_per_s is None else storage_bytes_per_s, nodes=storage_nodes)
    closed, played = feed(loader, result.step_time_s, storage), simulate_loading(loader, result.step_time_s, storage)
    if json:
        write_json({"workload": result.workload, "strategy": result.strategy, "closed_form": closed, "simulated": played})
        return
    typer.echo(f"{result.workload} on {result.cluster} [{result.strategy}], {loader.batch} samples a rank and step")
    typer.echo(f"closed form: {closed}\nsimulated: {played}")
