"""`simtrain show-env`: what simtrain sees on this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from simtrain.cli.options import JsonOption
from simtrain.cli.output import write_json, write_table
from simtrain.core import catalog
from simtrain.core.runtimes import RUNTIMES
from simtrain.core.units import format_bytes

PACKAGES = ("simtrain", "numpy", "scipy", "simpy", "pydantic", "typer", "rich", "matplotlib", "torch", "pandas")
GROUPS = ("devices", "links", "clusters", "compute_models", "workloads")


def show_env(json: JsonOption = False) -> None:
    """Show versions, this machine, the size of the catalogs and the runtimes."""
    seen = environment()
    if json:
        write_json(seen)
        return
    from simtrain.report.text import facts

    machine = seen["machine"]
    memory = format_bytes(machine["memory_bytes"]) if machine["memory_bytes"] else "not known"
    write_table(
        facts(
            [
                *((name, found or "not installed") for name, found in seen["versions"].items()),
                ("machine", f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable, {memory}"),
                ("system", machine["system"]),
                *((f"catalog of {group.replace('_', ' ')}", str(count)) for group, count in seen["catalogs"].items()),
                ("runtimes", ", ".join(seen["runtimes"])),
            ]
        )
    )


def environment() -> dict[str, Any]:
    """Returns versions (without importing anything heavy), the machine, catalog sizes and runtimes as plain data."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count() or 1,
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "memory_bytes": _memory_bytes(),
            "system": platform.platform(),
        },
        "catalogs": {group: len(catalog.names(group)) for group in GROUPS},
        "runtimes": list(RUNTIMES),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
