"""`simtrain run`: from start to target, with what goes wrong on the way."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from simtrain.cli.files import PICTURES, check_path, save_picture
from simtrain.cli.options import ClusterOption, JsonOption, RuntimeOption, SeqLenOption, StrategyOption, WorkloadArgument, read_strategy
from simtrain.cli.output import write_json, write_table
from simtrain.core import catalog
from simtrain.core.errors import InputError

if TYPE_CHECKING:
    from simtrain.run.snapshots import Snapshots


class SnapshotKind(StrEnum):
    """How the state is saved."""

    FULL = "full"
    SHARDED = "sharded"
    ASYNC = "async"


class BatchPolicyKind(StrEnum):
    """Whether the batch stays."""

    FIXED = "fixed"
    DYNAMIC = "dynamic"


class Pricing(StrEnum):
    """How devices are paid."""

    ON_DEMAND = "on-demand"
    SPOT = "spot"
    RESERVED = "reserved"


def run(
    workload: WorkloadArgument,
    *,
    cluster: ClusterOption,
    strategy: StrategyOption,
    target_loss: Annotated[float | None, typer.Option("--target-loss", help="Nats per token; by a loss law.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer updates.")] = None,
    tokens: Annotated[float | None, typer.Option("--tokens", help="Tokens processed.")] = None,
    batch_law: Annotated[
        Path | None,
        typer.Option("--batch-law", help="CSV of your own runs (columns batch, steps): as many steps as a law fitted to them says."),
    ] = None,
    law: Annotated[str | None, typer.Option("--law", help="chinchilla (default), chinchilla-replicated or kaplan.")] = None,
    efficiency: Annotated[
        float | None, typer.Option("--efficiency", help="Share of tokens that compression or rare synchronisation leave, for a loss.")
    ] = None,
    batch_policy: Annotated[
        BatchPolicyKind, typer.Option("--batch-policy", help="Whether the batch stays or follows the noise scale, for a target loss.")
    ] = BatchPolicyKind.FIXED,
    max_batch: Annotated[int | None, typer.Option("--max-batch", min=1, help="Samples a step that a dynamic batch may reach.")] = None,
    mtbf_h: Annotated[float | None, typer.Option("--mtbf-h", help="Mean hours between failures of the whole job.")] = None,
    device_mtbf_h: Annotated[float | None, typer.Option("--device-mtbf-h", help="Mean hours between failures of one device.")] = None,
    node_mtbf_h: Annotated[float | None, typer.Option("--node-mtbf-h", help="Mean hours between failures of one node.")] = None,
    preemption_h: Annotated[
        float | None,
        typer.Option("--preemption-h", help="Mean hours until a spot device of the job is taken back, for an hour on average."),
    ] = None,
    repair_h: Annotated[float, typer.Option("--repair-h", help="Hours until what failed is back.")] = 0.0,
    detection_s: Annotated[float, typer.Option("--detection-s", help="Seconds until a failure is noticed.")] = 0.0,
    restart_s: Annotated[float, typer.Option("--restart-s", help="Seconds of a restart.")] = 300.0,
    spares: Annotated[int, typer.Option("--spares", min=0, help="Devices kept ready.")] = 0,
    snapshot: Annotated[SnapshotKind, typer.Option("--snapshot", help="How the state is saved.")] = SnapshotKind.SHARDED,
    snapshot_every_s: Annotated[float | None, typer.Option("--snapshot-every-s", help="Daly's optimum by default.")] = None,
    pue: Annotated[float, typer.Option("--pue", help="The facility's energy over that of its machines.")] = 1.0,
    region: Annotated[str | None, typer.Option("--region", help="A country, for the carbon intensity, such as germany.")] = None,
    pricing: Annotated[Pricing, typer.Option("--pricing", help="How devices are paid.")] = Pricing.ON_DEMAND,
    usd_per_device_h: Annotated[float | None, typer.Option("--usd-per-device-h", help="The catalog's on-demand price by default.")] = None,
    reserved_h: Annotated[float | None, typer.Option("--reserved-h", help="Hours paid in any case (reserved).")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random numbers.")] = 0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many runs; the spread is printed.")] = 1,
    runtime: RuntimeOption = None,
    seq_len: SeqLenOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write progress and events as a picture (.png, .svg, .pdf).")] = None,
    json: JsonOption = False,
) -> None:
    """Predict when a run reaches its target, and what it takes: goodput, energy, carbon and cost."""
    from simtrain.run.batch_law import fit_batch_law, read_batch_runs
    from simtrain.run.batch_phases import dynamic_phases
    from simtrain.run.course import Target
    from simtrain.run.faults import Faults, Preemption
    from simtrain.run.policies import Policy
    from simtrain.run.predict_run import simulate_run
    from simtrain.run.site import Site

    check_path("--plot", plot, PICTURES)
    if sum(given is not None for given in (target_loss, steps, tokens, batch_law)) != 1:
        raise InputError("give exactly one of --target-loss, --steps, --tokens and --batch-law")
    subject, machines, how = catalog.workload(workload, seq_len=seq_len), catalog.cluster(cluster), read_strategy(strategy)
    fitted = fit_batch_law(*read_batch_runs(str(batch_law))) if batch_law is not None else None
    until = Target(loss=target_loss, steps=steps, tokens=tokens, batch_law=fitted)
    if batch_policy is BatchPolicyKind.FIXED and max_batch is not None:
        raise InputError("--max-batch belongs to --batch-policy dynamic")
    dynamic = batch_policy is BatchPolicyKind.DYNAMIC
    result = simulate_run(
        subject,
        machines,
        how,
        until=until,
        phases=dynamic_phases(subject, machines, how, until, law=law, max_batch=max_batch, runtime=runtime) if dynamic else (),
        faults=Faults(
            mtbf_h=mtbf_h,
            device_mtbf_h=device_mtbf_h,
            node_mtbf_h=node_mtbf_h,
            repair_h=repair_h,
            detection_s=detection_s,
            preemption=Preemption(preemption_h) if preemption_h is not None else None,
        ),
        snapshots=_snapshots(snapshot.value, snapshot_every_s),
        policy=Policy("spares" if spares else "restart", spares=spares, restart_s=restart_s),
        site=Site(pue=pue, region=region, pricing=pricing.value, usd_per_device_h=usd_per_device_h, reserved_h=reserved_h),
        law=law,
        efficiency=efficiency,
        runtime=runtime,
        seed=seed,
        seeds=seeds,
    )
    if json:
        write_json(result.to_dict())
    else:
        from simtrain.report import run_table

        write_table(run_table(result))
    if plot is not None:
        from simtrain.report import plot_run

        save_picture(plot, lambda ax: plot_run(result, ax), height_inch=6.0)


def _snapshots(kind: Literal["full", "sharded", "async"], every_s: float | None) -> Snapshots | None:
    """Stated snapshots, or `None` for the default of `simulate_run` (none if nothing fails)."""
    from simtrain.run.snapshots import Snapshots

    if every_s is not None:
        return Snapshots(kind, interval_s=every_s)
    return None if kind == "sharded" else Snapshots(kind)
