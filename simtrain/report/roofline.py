"""The rooflines of devices: attainable arithmetic over arithmetic intensity, from the numbers of their data sheets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from simtrain.core.errors import InputError
from simtrain.core.hardware import Device
from simtrain.core.precision import DType
from simtrain.core.units import format_flops
from simtrain.report.plots import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATHS = (DType.FP8, DType.BF16, DType.FP16, DType.TF32, DType.FP32)
"""Paths that a training step may run on, from narrow to wide."""

_ALL_PATHS = 6
_STYLES = {DType.FP8: ":", DType.BF16: "-", DType.FP16: "-", DType.TF32: "-.", DType.FP32: "--"}


def plot_roofline(devices: Iterable[Device] | Device, ax: Axes | None = None) -> Axes:
    """Draws `min(peak, intensity x bandwidth)` of each device and arithmetic path, both axes logarithmic; a dot marks each ridge.

    Args:
        devices: One or several; each has one colour, each path one line style. Equal peaks of one device are drawn once, and of more
            than six devices only the 16-bit path (fp32 where there is none).
        ax: Where to draw; new Axes by default.

    Raises:
        InputError: No devices.
    """
    rows = [devices] if isinstance(devices, Device) else list(devices)
    if not rows:
        raise InputError("plot_roofline needs at least one device")
    ax = new_axes(9, 6) if ax is None else ax
    paths = [_peaks(d) if len(rows) <= _ALL_PATHS else _sixteen_bit(_peaks(d)) for d in rows]
    ridges = [peak / d.memory.bandwidth_bytes_per_s for d, peaks in zip(rows, paths, strict=True) for _, peak in peaks]
    intensity = np.geomspace(min(0.5, 0.5 * min(ridges)), 20 * max(ridges), 400)
    for i, (device, peaks) in enumerate(zip(rows, paths, strict=True)):
        colour = f"C{i % 10}"
        for path, peak in peaks:
            attainable = np.minimum(peak, intensity * device.memory.bandwidth_bytes_per_s)
            label = f"{device.name} {path}: {format_flops(peak)}, ridge {peak / device.memory.bandwidth_bytes_per_s:.0f} FLOP/B"
            ax.plot(intensity, attainable / 1e12, color=colour, linestyle=_STYLES[path], linewidth=1.5, label=label)
            ax.plot([peak / device.memory.bandwidth_bytes_per_s], [peak / 1e12], "o", color=colour, markersize=4)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("arithmetic intensity (FLOP per byte of memory traffic)")
    ax.set_ylabel("attainable (TFLOP/s)")
    ax.set_title("Rooflines from data sheets: dense peaks and peak bandwidth", fontsize=10)
    ax.grid(visible=True, which="both", linewidth=0.3, alpha=0.5)
    if len(rows) <= _ALL_PATHS:
        ax.legend(loc="lower right", fontsize=7, frameon=False)
    else:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=6, frameon=False)
    return ax


def _sixteen_bit(peaks: list[tuple[DType, float]]) -> list[tuple[DType, float]]:
    return [p for p in peaks if p[0] in (DType.BF16, DType.FP16)][:1] or peaks[-1:]


def _peaks(device: Device) -> list[tuple[DType, float]]:
    """Paths and peaks of a device, each peak once."""
    found: dict[float, DType] = {}
    for path in PATHS:
        if path in device.peak_flops:
            found.setdefault(device.peak_flops[path], path)
    return [(path, peak) for peak, path in found.items()] or [(path, peak) for path, peak in device.peak_flops.items()]
