"""The entry points of this package: devices, links, clusters, compute models and file readers, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from hardware_models.cpu import CpuModel
from hardware_models.gpu import GpuModel
from hardware_models.measured import MeasuredModel
from hardware_models.reading import read_cluster, read_device, read_link
from hardware_models.spatial import SpatialModel
from hardware_models.systolic import SystolicModel
from simtrain.core import catalog
from simtrain.core.errors import CatalogError
from simtrain.core.hardware import Cluster, ComputeModel, Device, Link

Item = TypeVar("Item", Device, Link, Cluster)

SENTINEL = "simtrain.hardware_models"
"""Tells this package from a folder of the same name that shadows it."""


@cache
def devices() -> Mapping[str, Device]:
    """Returns the devices of `hardware_models/devices/`."""
    return _by_name([read_device(path) for path in _toml_files("devices")])


@cache
def links() -> Mapping[str, Link]:
    """Returns the links of `hardware_models/links/`."""
    return _by_name([read_link(path) for path in _toml_files("links")])


@cache
def clusters() -> Mapping[str, Cluster]:
    """Returns the clusters of `hardware_models/clusters/`."""
    return _by_name([read_cluster(path, catalog.device, catalog.link) for path in _toml_files("clusters")])


@cache
def compute_models() -> Mapping[str, ComputeModel]:
    """Returns the compute models, by the name that device files give as `compute_model`."""
    models: tuple[ComputeModel, ...] = (GpuModel(), MeasuredModel(), CpuModel(), SystolicModel(), SpatialModel())
    return {model.name: model for model in models}


def file_readers() -> Mapping[str, Callable[[Path], Any]]:
    """Returns the functions that read a user's own files, by kind."""
    return {"device": read_device, "link": read_link, "cluster": _read_user_cluster}


def _read_user_cluster(path: Path) -> Cluster:
    return read_cluster(path, partial(_device_beside, path.parent), catalog.link)


def _device_beside(folder: Path, name: str) -> Device:
    """Looks a device up; a `.toml` name is a file next to the cluster file that names it."""
    return read_device(folder / name) if name.endswith(".toml") else catalog.device(name)


def _toml_files(folder: str) -> list[Traversable]:
    found = files("hardware_models").joinpath(folder).iterdir()
    return sorted((path for path in found if path.name.endswith(".toml")), key=lambda path: path.name)


def _by_name(items: list[Item]) -> dict[str, Item]:
    named = {item.name: item for item in items}
    if len(named) < len(items):
        raise CatalogError(f"two files of hardware_models share one of the names {', '.join(i.name for i in items)}")
    return named
