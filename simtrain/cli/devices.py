"""`simtrain devices`: what the catalog holds, filtered, compared or drawn, and where each number comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simtrain.cli.catalogs import NameArgument, select
from simtrain.cli.files import PICTURES, check_path, save_picture
from simtrain.cli.options import JsonOption
from simtrain.cli.output import plain, write_json, write_table
from simtrain.core import catalog
from simtrain.core.errors import InputError, UnknownNameError, fold
from simtrain.core.hardware import Device
from simtrain.core.precision import DType
from simtrain.core.units import parse_quantity


def devices(
    name: NameArgument = None,
    device_class: Annotated[str | None, typer.Option("--class", help="Only this class: gpu, cpu, systolic, spatial, ...")] = None,
    vendor: Annotated[str | None, typer.Option(help="Only devices of this maker.")] = None,
    memory_min: Annotated[str | None, typer.Option(help="At least this much memory, such as '40 GiB'.")] = None,
    bandwidth_min: Annotated[str | None, typer.Option(help="At least this memory bandwidth, such as '1 TB/s'.")] = None,
    precision: Annotated[str | None, typer.Option(help="Only devices with this arithmetic: fp32, tf32, bf16, fp16, fp8.")] = None,
    since: Annotated[int | None, typer.Option(help="Only devices of this year and later.")] = None,
    compare: Annotated[str | None, typer.Option(help="Devices side by side, such as 'a100-sxm-80g,h100-sxm'.")] = None,
    roofline: Annotated[Path | None, typer.Option(help="Draw the rooflines of what is listed into a file (.png, .svg, .pdf).")] = None,
    origins: Annotated[bool, typer.Option("--origins", help="Count where numbers come from, and name those nobody looked up.")] = False,
    json: JsonOption = False,
) -> None:
    """List devices, or show one (or a .toml file) with the source of every number; filter, compare, or draw rooflines."""
    from simtrain import report

    check_path("--roofline", roofline, PICTURES)
    if compare is not None and name is not None:
        raise InputError("give either a name or --compare, not both")
    chosen = _compared(compare) if compare is not None else select("devices", name, catalog.device)
    items = _filtered(chosen, device_class, vendor, memory_min, bandwidth_min, precision, since)
    if roofline is not None:
        save_picture(roofline, lambda ax: report.plot_roofline(items, ax), height_inch=7.0)
    if json:
        write_json({"devices": [plain(item) for item in items]})
    elif origins:
        write_table(report.origins_table(items))
    elif compare is not None:
        write_table(report.devices_comparison(items))
    elif name is not None and len(items) == 1:
        write_table(report.device_details(items[0]))
    else:
        write_table(report.devices_table(items))


def _compared(text: str) -> list[Device]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if len(names) < 2:
        raise InputError(f"--compare {text!r}: give at least two devices, separated by commas")
    return [catalog.device(name) for name in names]


def _filtered(
    items: list[Device],
    device_class: str | None,
    vendor: str | None,
    memory_min: str | None,
    bandwidth_min: str | None,
    precision: str | None,
    since: int | None,
) -> list[Device]:
    """Keeps what meets every condition.

    Raises:
        UnknownNameError: A class, maker or number format that no device has.
        InputError: Nothing is left.
    """
    kept = items
    if device_class is not None:
        _known("class", device_class, [d.device_class for d in items])
        kept = [d for d in kept if fold(d.device_class) == fold(device_class)]
    if vendor is not None:
        _known("vendor", vendor, [d.vendor for d in items])
        kept = [d for d in kept if fold(vendor) in fold(d.vendor)]
    if memory_min is not None:
        least = parse_quantity(memory_min, "B")
        kept = [d for d in kept if d.memory.capacity_bytes >= least]
    if bandwidth_min is not None:
        rate = parse_quantity(bandwidth_min, "B/s")
        kept = [d for d in kept if d.memory.bandwidth_bytes_per_s >= rate]
    if precision is not None:
        _known("precision", precision, [path.value for path in DType])
        kept = [d for d in kept if any(fold(path.value) == fold(precision) for path in d.peak_flops)]
    if since is not None:
        kept = [d for d in kept if d.year >= since]
    if not kept:
        raise InputError(f"no device meets all conditions (of {len(items)}): loosen one of them")
    return kept


def _known(what: str, given: str, values: list[str]) -> None:
    if not any(fold(given) in fold(value) if what == "vendor" else fold(given) == fold(value) for value in values):
        raise UnknownNameError(what, given, list(dict.fromkeys(values)))
