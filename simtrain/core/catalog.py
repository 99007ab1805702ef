"""Catalogs: devices, links, clusters, compute models and workloads by name, found through entry points.

simtrain itself knows no device and no model. Each entry point of a group below names a function without arguments that returns a
mapping from name to item; other distributions add theirs the same way.

| entry point group | items |
|---|---|
| `simtrain.devices` | `Device` |
| `simtrain.links` | `Link` |
| `simtrain.clusters` | `Cluster` |
| `simtrain.compute_models` | `ComputeModel` |
| `simtrain.workloads` | `WorkloadFactory` |
| `simtrain.schedules` | pipeline schedules (`simtrain.step.schedules.language.Schedule`) |
| `simtrain.evidence` | functions that find measured runs near to a question (`simtrain.planner.evidence.Provider`) |
| `simtrain.file_readers` | functions from a path to a `Device` or `Cluster`, by kind ("device", "cluster") |
| `simtrain.device_readers` | functions from text to a `Device`, by the prefix that selects them ("profile" reads "profile:FILE.json") |
| `simtrain.workload_readers` | `WorkloadReader`, by the prefix that selects it ("capture" reads "capture:FILE.py:FUNCTION") |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from simtrain.core.errors import CatalogError, UnknownNameError, fold
from simtrain.core.hardware import Cluster, ComputeModel, Device, Link
from simtrain.core.workload import Workload

_COUNTED = re.compile(r"\s*\d+\s*[x×*]|.*\+")  # "4x my-card.toml" counts devices, "my-cluster.toml" is a file


class WorkloadFactory(Protocol):
    """Builds a workload of a given sequence length; `options` are the family's own."""

    def __call__(self, *, seq_len: int | None = None, **options: Any) -> Workload:
        """Returns the workload; the preset's own sequence length if none is given."""
        ...


class WorkloadReader(Protocol):
    """Makes a workload from what stands behind its prefix and a colon."""

    def __call__(self, text: str, *, seq_len: int | None = None) -> Workload:
        """Returns the workload; its own sequence length if none is given."""
        ...


@cache
def _items(group: str) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for entry in entry_points(group=group):
        try:
            provider: Callable[[], Mapping[str, Any]] = entry.load()
        except (ImportError, AttributeError) as error:
            raise CatalogError(
                f"catalog {entry.name!r} ({entry.value}) cannot be imported: {error}. A folder or file of yours may shadow the "
                f"package {entry.value.split('.')[0].split(':')[0]!r}: rename it or run from another folder"
            ) from error
        items.update(provider())
    return items


def _read_file(kind: str, name: str) -> Any:
    readers = _items("simtrain.file_readers")
    if kind not in readers:
        raise CatalogError(f"{name}: no installed package reads {kind} files (entry point group 'simtrain.file_readers')")
    if not Path(name).is_file():
        raise CatalogError(f"{name}: there is no such {kind} file")
    return readers[kind](Path(name))


@cache
def _by_folded(group: str) -> dict[str, str]:
    folded: dict[str, str] = {}
    for name, item in _items(group).items():
        for alias in (name, *getattr(item, "aliases", ())):
            folded.setdefault(fold(alias), name)
    return folded


def names(group: str) -> tuple[str, ...]:
    """Returns the names in a catalog ("devices", "links", "clusters", "compute_models", "workloads")."""
    return tuple(sorted(_items(f"simtrain.{group}")))


def find(group: str, name: str) -> Any:
    """Looks an item up by name or alias; case, spaces and hyphens do not matter.

    Raises:
        UnknownNameError: With the nearest names.
    """
    items, by_folded = _items(f"simtrain.{group}"), _by_folded(f"simtrain.{group}")
    if fold(name) not in by_folded:
        raise UnknownNameError(group.rstrip("s").replace("_", " "), name, items)
    return items[by_folded[fold(name)]]


def device(name: str) -> Device:
    """Returns a device by name, reads a `.toml` file, or what stands behind a reader's prefix, such as "profile:machine".

    Raises:
        UnknownNameError: With the nearest names; also if the file names a compute model that does not exist.
        CatalogError: The file breaks the schema.
        InputError: The reader cannot read it.
    """
    prefix, colon, text = name.partition(":")
    readers: dict[str, Callable[[str], Device]] = _items("simtrain.device_readers") if colon else {}
    if prefix.strip() in readers:
        return readers[prefix.strip()](text.strip())
    if name.endswith(".toml"):
        read: Device = _read_file("device", name)
        compute_model(read.compute_model)  # an unknown one would show only when something is priced
        return read
    found: Device = find("devices", name)
    return found


def link(name: str) -> Link:
    """Returns a kind of link by name.

    Raises:
        UnknownNameError: With the nearest names.
    """
    found: Link = find("links", name)
    return found


def compute_model(name: str) -> ComputeModel:
    """Returns a compute model by name.

    Raises:
        UnknownNameError: With the nearest names.
    """
    found: ComputeModel = find("compute_models", name)
    return found


def workload(name: str, *, seq_len: int | None = None, **options: Any) -> Workload:
    """Builds a workload by name.

    Args:
        name: A preset such as "gpt2-small", or a prefix of a reader and what it reads, such as "capture:my_model.py:build".
        seq_len: Sequence length; the preset's own by default.
        options: The family's own (depth, width, attention, ...).

    Raises:
        UnknownNameError: With the nearest names.
        InputError: An option is out of range.
    """
    prefix, colon, text = name.partition(":")
    readers: dict[str, WorkloadReader] = _items("simtrain.workload_readers") if colon else {}
    if prefix in readers and not options:
        return readers[prefix](text, seq_len=seq_len)
    factory: WorkloadFactory = find("workloads", name)
    return factory(seq_len=seq_len, **options)


def cluster(text: str) -> Cluster:
    """Returns a cluster: a preset, a `.toml` file, or devices such as `"8x a100-sxm-80g + 4x v100-sxm-32g"`.

    Raises:
        UnknownNameError: With the nearest names.
        CatalogError: The file breaks the schema.
        InputError: The text cannot be read.
    """
    from simtrain.core.cluster_text import parse_cluster

    if text.endswith(".toml") and (Path(text).is_file() or not _COUNTED.match(text)):
        read: Cluster = _read_file("cluster", text)
        return read
    known = _by_folded("simtrain.clusters")
    if fold(text) in known:
        found: Cluster = find("clusters", text)
        return found
    return parse_cluster(text)
