"""`simtrain allocate`: which devices of a mixed cluster run which layers, and which share of each batch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simtrain.cli.files import PICTURES, check_path, save_picture
from simtrain.cli.options import (
    ClusterOption,
    JsonOption,
    MemoryMarginOption,
    OptimizerOption,
    RuntimeOption,
    SeqLenOption,
    WorkloadArgument,
)
from simtrain.cli.output import write_json, write_table
from simtrain.core import catalog


def allocate(
    workload: WorkloadArgument,
    *,
    cluster: ClusterOption,
    global_batch: Annotated[int, typer.Option("--global-batch", min=1, help="Samples per optimizer update.")],
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="Of all devices, or repeat for several among which stages choose; by default 16-bit."),
    ] = None,
    optimizer: OptimizerOption = "adamw",
    runtime: RuntimeOption = None,
    micro_batch: Annotated[list[int] | None, typer.Option("--micro-batch", min=1, help="Allowed sizes; repeat for several.")] = None,
    tensor: Annotated[list[int] | None, typer.Option("--tensor", min=1, help="Allowed tensor widths; repeat for several.")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option("--checkpoint", help="Allowed: none, full, selective; repeat for several.")
    ] = None,
    zero: Annotated[
        list[int] | None, typer.Option("--zero", help="Allowed ZeRO stages, 0 and 1 (replicas share optimizer states); repeat for several.")
    ] = None,
    sequence_parallel: Annotated[
        bool | None,
        typer.Option("--sequence-parallel/--no-sequence-parallel", help="Of tensor-parallel devices; whatever is faster by default."),
    ] = None,
    memory_margin: MemoryMarginOption = 0.0,
    worth: Annotated[bool, typer.Option("--worth/--no-worth", help="What each kind of device adds: plans anew without it.")] = True,
    seq_len: SeqLenOption = None,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", "--gantt", help="Write what runs when as a picture (.png, .svg, .pdf).")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Allocate layers and shares of each batch to devices that differ."""
    from simtrain.planner.allocation.allocate import CHECKPOINTS, MICRO_BATCHES, SEQUENCES, TENSORS, ZEROS
    from simtrain.planner.allocation.allocate import allocate as find
    from simtrain.report.allocation import allocation_table, plot_allocation

    check_path("--timeline", timeline, PICTURES)
    found = find(
        catalog.workload(workload, seq_len=seq_len),
        catalog.cluster(cluster),
        global_batch,
        precision=precision,
        optimizer=optimizer,
        runtime=runtime,
        tensors=tuple(tensor or TENSORS),
        micro_batches=tuple(micro_batch or MICRO_BATCHES),
        checkpoints=tuple(checkpoint or CHECKPOINTS),
        zeros=tuple(zero or ZEROS),
        sequences=SEQUENCES if sequence_parallel is None else (sequence_parallel,),
        memory_margin=memory_margin,
        worth=worth,
    )
    if json:
        write_json(found.to_dict())
    else:
        write_table(allocation_table(found))
    if timeline is not None:
        save_picture(timeline, lambda ax: plot_allocation(found, ax), height_inch=1.5 + 0.55 * len(found.memory))
