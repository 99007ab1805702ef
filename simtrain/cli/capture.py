"""`simtrain capture`: a PyTorch model of yours as a workload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simtrain.cli.files import check_path
from simtrain.cli.options import JsonOption, SeqLenOption
from simtrain.cli.output import note, plain, write_json, write_table
from simtrain.core import catalog
from simtrain.core.errors import InputError

FunctionArgument = Annotated[
    str, typer.Argument(metavar="FILE.py:FUNCTION", help="A function without arguments that returns (model, batch), or a dict of them.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write every operator as JSON.")]


def capture(function: FunctionArgument, *, seq_len: SeqLenOption = None, out: OutOption = None, json: JsonOption = False) -> None:
    """Capture a PyTorch model and show it as a workload; 'predict capture:FILE.py:FUNCTION' and 'plan' take it, too."""
    check_path("--out", out, (".json",))
    workload = catalog.workload(f"capture:{function}", seq_len=seq_len)
    if json:
        from simtrain.cli.catalogs import workload_data

        write_json({"workloads": [workload_data(workload)]})
    else:
        from simtrain.report import workload_details

        write_table(workload_details(workload))
    if out is not None:
        import json as json_format

        try:
            out.write_text(json_format.dumps(plain(workload), indent=1), encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror or error}") from None
        note(f"wrote {out}")
