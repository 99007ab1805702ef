"""The commands of `simtrain validate` about whole trainings: the batch law on public jobs, and the proposal's table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from simtrain.cli.files import PICTURES, check_path, save_picture
from simtrain.cli.output import write_json
from simtrain.core.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Save = Annotated[Path | None, typer.Option("--save", help="File to write the outcome to, as JSON.")]


def validate_batch_law(as_json: Json = False) -> None:
    """Fit S(B) = S_min (1 + B_noise / B) to six public jobs, and predict each of their runs from the others."""
    from validation.batch_jobs import fit_jobs, source

    fits = fit_jobs()
    if as_json:
        write_json({"source": source(), "jobs": fits})
        return
    typer.echo(f"{'job':<13}{'model':<30}{'S_min':>9}{'B_noise':>11}{'fit':>8}{'left out':>10}{'linear':>9}")
    for f in fits:
        worst = max(abs(e) for e in f.errors)
        law = f.law
        typer.echo(
            f"{f.job:<13}{f.model:<30}{law.min_steps:>9.4g}{law.noise_scale:>11.4g}{law.largest_error:>8.1%}{worst:>10.1%}{f.linear_error:>9.1%}"
        )
    typer.echo("fit: worst error of a run; left out: of a run by the others' law; linear: if steps fell as 1 / batch (null model)")
    typer.echo(f"points: {source()}")


def validate_proposal(
    run: Annotated[bool, typer.Option("--run", help="Train for real, on the cards (or cores) at hand, instead of predicting.")] = False,
    cifar10: Annotated[Path | None, typer.Option("--cifar10", help="Folder with CIFAR-10, as distributed (binary or Python).")] = None,
    wikitext2: Annotated[Path | None, typer.Option("--wikitext2", help="Folder with wiki.train.tokens and wiki.valid.tokens.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=3, help="Of real runs, in pairs.")] = 5,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Of real runs; 30 and 5 by default.")] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Of real runs: one for each card.")] = 4,
    cluster: Annotated[str, typer.Option("--cluster", help="Four devices, for predictions.")] = "4x rtx-3090",
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the predicted ablation as a picture (.png, .svg, .pdf).")] = None,
    as_json: Json = False,
    save: Save = None,
) -> None:
    """A proposal's claims for ResNet-50/CIFAR-10 and GPT-2/WikiText-2 on 4 RTX 3090: predicted with every ablation, or run for real."""
    folders = {"resnet50-cifar10": cifar10, "gpt2-wikitext2": wikitext2}
    if run:
        _run_proposal({name: path for name, path in folders.items() if path}, seeds, epochs, processes, as_json=as_json, save=save)
        return
    if any(folders.values()):
        raise InputError("--cifar10 and --wikitext2 belong to real runs: add --run")
    from validation.proposal import JOBS, predict_job
    from validation.proposal_report import make_report, plot_ablation

    check_path("--plot", plot, PICTURES)
    report = make_report([predict_job(name, cluster) for name in JOBS], cluster)
    _tell([report.to_dict()], str(report), as_json=as_json, save=save)
    if plot is not None:
        save_picture(plot, lambda ax: plot_ablation(report, ax), height_inch=6.0)


def _run_proposal(folders: dict[str, Path], seeds: int, epochs: float | None, processes: int, *, as_json: bool, save: Path | None) -> None:
    from validation.proposal_runs import Plan, run_job

    if not folders:
        raise InputError("give the data: --cifar10 FOLDER, --wikitext2 FOLDER or both")
    plan = Plan(seeds=seeds, epochs=epochs, processes=processes)
    jobs = [run_job(name, folder, plan, lambda line: typer.echo(line, err=True)) for name, folder in folders.items()]
    _tell([job.to_dict() for job in jobs], "\n\n".join(str(job) for job in jobs), as_json=as_json, save=save)


def _tell(data: list[dict[str, object]], text: str, *, as_json: bool, save: Path | None) -> None:
    whole = data[0] if len(data) == 1 else {"jobs": data}
    if save:
        save.write_text(json.dumps(whole, indent=1) + "\n")
    if as_json:
        write_json(whole)
    else:
        sys.stdout.write(text + "\n")
