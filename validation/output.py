"""What the commands of this package share: their options, and how a report is shown and saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from simtrain.cli.files import TRACES, check_path
from simtrain.cli.output import plain, write_json


def _writable(path: Path | None) -> Path | None:
    check_path("--save", path, TRACES)
    return path


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Save = Annotated[Path | None, typer.Option("--save", callback=_writable, help="File to write the outcome to, as JSON.")]


class Report(Protocol):
    """What can be shown in either way; `str()` of it is the text."""

    def to_dict(self) -> Any:
        """Returns plain data for JSON."""
        ...


def tell(report: Report, *, as_json: bool, save: Path | None = None) -> None:
    """Writes a report on standard output, as text or as JSON, and into a file if one is named."""
    tell_data(report.to_dict(), str(report), as_json=as_json, save=save)


def tell_data(data: Any, text: str, *, as_json: bool, save: Path | None = None) -> None:
    """Writes plain data as JSON or the text that says the same, and the data into a file if one is named."""
    keep(data, save)
    if as_json:
        write_json(data)
    else:
        sys.stdout.write(text + "\n")


def keep(data: Any, path: Path | None) -> None:
    """Writes plain data into a file as JSON, if one is named."""
    if path is not None:
        path.write_text(json.dumps(plain(data), indent=1) + "\n")


def progress(line: str) -> None:
    """Says how far a long command is, if someone watches."""
    if sys.stderr.isatty():
        typer.echo(line, err=True)
