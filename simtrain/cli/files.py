"""Files that commands write beside their answer. Paths are checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from simtrain.cli.output import note
from simtrain.core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simtrain.core.result import Result
    from simtrain.planner.found import Plan
    from simtrain.planner.why import Comparison

PICTURES = (".png", ".svg", ".pdf")
TRACES = (".json",)
PAGES = (".html", ".htm")


def check_path(option: str, path: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """Refuses a path that cannot be written.

    Args:
        option: As typed.
        path: What was given for it.
        suffixes: What it may end in; anything by default.

    Raises:
        InputError: Another suffix, or a folder that does not exist.
    """
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{option} {path}: the file must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")


def check_outputs(*, timeline: Path | None, memory_plot: Path | None, trace: Path | None, report: Path | None) -> None:
    """Refuses paths of `write_files` and `write_report` that cannot be written.

    Raises:
        InputError: Another suffix, or a folder that does not exist.
    """
    check_path("--timeline", timeline, PICTURES)
    check_path("--memory-plot", memory_plot, PICTURES)
    check_path("--trace", trace, TRACES)
    check_path("--report", report, PAGES)


def write_files(result: Result, *, timeline: Path | None = None, memory: Path | None = None, trace: Path | None = None) -> None:
    """Writes the pictures and the trace that were asked for, and says so on standard error.

    Raises:
        InputError: A file cannot be written, or the result does not hold what it needs.
    """
    from simtrain import report

    if timeline is not None:
        from simtrain.report.timeline import timeline_rows

        height_inch = 1.5 + 0.55 * len(timeline_rows(result)[0])
        save_picture(timeline, lambda ax: report.plot_timeline(result, ax), height_inch=height_inch)
    if memory is not None:
        save_picture(memory, lambda ax: report.plot_memory(result, ax), height_inch=5.0)
    if trace is not None:
        report.save_trace(result, trace)
        note(f"wrote {trace}")


def write_report(subject: Result | Plan | Comparison, path: Path | None) -> None:
    """Writes the page that was asked for, and says so on standard error.

    Raises:
        InputError: It cannot be written.
    """
    if path is not None:
        subject.report(path)
        note(f"wrote {path}")


def save_picture(path: Path, draw: Callable[[Axes], object], *, height_inch: float) -> None:
    """Draws a picture of its own, without a display, and says so on standard error.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(12, height_inch), layout="constrained")
    draw(figure.subplots())
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure and says so on standard error.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    note(f"wrote {path}")
