"""Commands that compare with what others measured: kernels, collectives, steps on TPU slices and on mixed GPUs."""

from __future__ import annotations

from typing import Annotated

import typer

from simtrain.cli.output import write_json
from validation.output import Json, tell


def validate_mixed(
    fit: Annotated[bool, typer.Option("--fit", help="Fit constants to AMP's mixed trials, micro-batch sizes held out (minutes).")] = False,
    as_json: Json = False,
) -> None:
    """Compare predictions with real steps on mixed GPUs (AMP) and on profiled GH200 (Sailor), beside the sources' own models."""
    from validation.mixed import compare_mixed

    report = compare_mixed(fit=fit)
    tell(report, as_json=as_json)


def validate_tpu(as_json: Json = False) -> None:
    """Compare predicted steps of transformers on TPU slices with published ones, beside one MFU per chip (two minutes)."""
    from validation.tpu_slices import compare_slices

    report = compare_slices()
    tell(report, as_json=as_json)


def validate_collectives(as_json: Json = False) -> None:
    """Compare predicted collectives with published measurements on NVLink and over a network, held out by group."""
    from validation.collective_runs import compare

    report = compare()
    tell(report, as_json=as_json)


def validate_kernels(as_json: Json = False) -> None:
    """Compare the device models with published times of matrix products and of passes on one device, beside null models."""
    from validation.kernels_published import FITTED_SETS, HELD_OUT_SETS, compare_kernels
    from validation.published import compare_all

    kernels, held_out, fitted = compare_kernels(), compare_all(HELD_OUT_SETS), compare_all(FITTED_SETS)
    if as_json:
        fitted_data = [r.to_dict() for r in fitted]
        data = {"kernels": [r.to_dict() for r in kernels], "steps": [r.to_dict() for r in held_out], "steps_fitted_on": fitted_data}
        write_json(data)
    else:
        typer.echo("\n\n".join(str(r) for r in (*kernels, *held_out)))
        typer.echo("\nConstants were fitted on the rows that follow: what is left of their errors is no prediction.")
        typer.echo("\n\n".join(str(r) for r in fitted))
