"""Reads device, link and cluster files, and says file, line, field and fix where one breaks the schema."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from hardware_models.schema import (
    ABSENT,
    CLASS_SPREAD,
    CLUSTER_NUMBERS,
    DEVICE_NUMBERS,
    LINK_NUMBERS,
    PEAK_PATHS,
    ClusterFile,
    DeviceFile,
    LinkFile,
    NetworkTable,
    NodeTable,
    Number,
    NumberField,
    named_field,
    parse_number,
)
from simtrain.core.errors import CatalogError, InputError, UnknownNameError, nearest
from simtrain.core.hardware import Cluster, Device, Link, MemoryTier, Node, Provenance, Storage, ValueKind
from simtrain.core.network import SWITCH, Network
from simtrain.core.precision import DType
from simtrain.core.units import DIMENSIONS

F = TypeVar("F", DeviceFile, LinkFile, ClusterFile)
Found = TypeVar("Found", Device, Link)

_DEVICES = re.compile(r"^\s*(?:(\d+)\s*[x×*]\s*)?(\S.*?)\s*$")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a file: the path of keys to it, and what to do about it."""

    path: tuple[str | int, ...]
    text: str


def read_device(path: Path | Traversable) -> Device:
    """Reads a device file.

    Raises:
        CatalogError: With file, line, field and fix of each problem.
    """
    text = _read(path)
    file = _validate(path, text, DeviceFile)
    numbers = _numbers(file.numbers, DEVICE_NUMBERS)
    architecture, problems = _named("architecture", file.architecture)
    profile, wrong = _named("profile", file.profile)
    problems += wrong
    if not any(target.startswith("peak_flops.") for target in numbers):
        problems.append(Problem(("numbers",), "no peak: give at least one of " + ", ".join(f"peak_{path}" for path in PEAK_PATHS)))
    open_numbers = {f"architecture.{key}": number for key, number in architecture.items()}
    open_numbers |= {f"profile.{key}": number for key, number in profile.items()}
    provenance = _provenance(path, text, file.sources, numbers | open_numbers, problems)
    value = {key: number.value for key, number in numbers.items()}
    for target, (fill, said) in ABSENT.items():
        if target not in value:
            value[target] = fill(value["power_w"])
            provenance[target] = Provenance(ValueKind.ASSUMPTION, said)
    if "speed_spread" not in numbers and file.device_class in CLASS_SPREAD:
        value["speed_spread"], provenance["speed_spread"] = CLASS_SPREAD[file.device_class]
    return Device(
        name=file.name,
        device_class=file.device_class,
        vendor=file.vendor,
        year=int(value["year"]),
        peak_flops={path: value[f"peak_flops.{path}"] for path in DType if f"peak_flops.{path}" in value},
        memory=MemoryTier(file.memory_technology, value["memory.capacity_bytes"], value["memory.bandwidth_bytes_per_s"]),
        multiprocessors=int(value["multiprocessors"]),
        lanes_per_multiprocessor=int(value["lanes_per_multiprocessor"]),
        clock_hz=value["clock_hz"],
        cache_bytes=value["cache_bytes"],
        power_w=value["power_w"],
        idle_power_w=value["idle_power_w"],
        price_usd_per_hour=value["price_usd_per_hour"],
        host_link=file.host_link,
        peer_link=file.peer_link,
        node_size=file.node_size,
        compute_model=file.compute_model or file.device_class,
        architecture={key: number.value for key, number in architecture.items()},
        profile={key: number.value for key, number in profile.items()},
        provenance=provenance,
        aliases=tuple(file.aliases),
        speed_spread=value.get("speed_spread", 0.0),
    )


def read_link(path: Path | Traversable) -> Link:
    """Reads a link file.

    Raises:
        CatalogError: With file, line, field and fix of each problem.
    """
    text = _read(path)
    file = _validate(path, text, LinkFile)
    numbers = _numbers(file.numbers, LINK_NUMBERS)
    provenance = _provenance(path, text, file.sources, numbers, [])
    value = {key: number.value for key, number in numbers.items()}
    return Link(
        name=file.name,
        bandwidth_bytes_per_s=value["bandwidth_bytes_per_s"],
        efficiency=value["efficiency"],
        latency_s=value["latency_s"],
        provenance=provenance,
        aliases=tuple(file.aliases),
    )


def read_cluster(path: Path | Traversable, device: Callable[[str], Device], link: Callable[[str], Link]) -> Cluster:
    """Reads a cluster file.

    Args:
        path: The file.
        device: Looks a device up by name; raises `UnknownNameError`.
        link: Looks a link up by name; raises `UnknownNameError`.

    Raises:
        CatalogError: With file, line, field and fix of each problem.
    """
    text = _read(path)
    device = cache(device)  # a file that is named twice is one kind of device
    file = _validate(path, text, ClusterFile)
    numbers = _numbers(file.numbers, CLUSTER_NUMBERS)
    problems: list[Problem] = []
    if file.structure not in file.sources:
        problems.append(Problem(("structure",), _no_source(file.structure, file.sources)))
    nodes: list[Node] = []
    memory = numbers.get("host.memory.capacity_bytes")
    storage = _storage(numbers, problems)
    for index, table in enumerate(file.nodes):
        nodes += [replace(n, storage=storage) for n in _nodes(table, index, memory, problems, device=device, link=link)]
    network = _network(file.network, numbers.get("network.oversubscription"), sum(len(n.devices) for n in nodes), file.name, problems)
    if file.network and file.network.source not in file.sources:
        problems.append(Problem(("network", "source"), _no_source(file.network.source, file.sources)))
    provenance = _provenance(path, text, file.sources, numbers, problems)
    if file.network:
        provenance["network"] = Provenance(ValueKind.SPECIFICATION, file.sources[file.network.source])
    # Counts in [[nodes]] share one source: they describe one machine, not separate facts.
    provenance["structure"] = Provenance(ValueKind.SPECIFICATION, file.sources[file.structure])
    return Cluster(
        name=file.name,
        nodes=tuple(nodes),
        assumptions=tuple(file.assumptions),
        aliases=tuple(file.aliases),
        host_power_w=numbers["host_power_w"].value,
        provenance=provenance,
        network=network,
    )


def _storage(numbers: Mapping[str, Number], problems: list[Problem]) -> Storage | None:
    found = {name: numbers.get(f"storage.{name}") for name in ("capacity_bytes", "read_bytes_per_s", "write_bytes_per_s")}
    values = {name: number.value for name, number in found.items() if number is not None}
    if values and len(values) < len(found):
        problems.append(Problem(("numbers",), "drives need all of nvme_capacity, nvme_read and nvme_write"))
    return Storage(**values) if len(values) == len(found) else None


def _network(table: NetworkTable | None, oversubscription: Number | None, ranks: int, name: str, problems: list[Problem]) -> Network:
    if table is None:
        if oversubscription is not None:
            problems.append(Problem(("numbers", "oversubscription"), 'belongs to a network: add [network] with kind = "fat-tree"'))
        return SWITCH
    try:
        network = Network(
            kind=table.kind,
            nodes_per_group=table.nodes_per_group,
            oversubscription=oversubscription.value if oversubscription else 1.0,
            dimensions=tuple(table.dimensions),
            wraparound=tuple(table.wraparound),
            in_network_reduction=table.in_network_reduction,
        )
        if not problems:  # else devices are missing because their names are wrong
            network.check(ranks, name)
    except InputError as error:
        problems.append(Problem(("network", "dimensions" if "dimensions" in str(error) else "kind"), str(error)))
        return SWITCH
    return network


def _nodes(
    table: NodeTable,
    index: int,
    memory: Number | None,
    problems: list[Problem],
    *,
    device: Callable[[str], Device],
    link: Callable[[str], Link],
) -> list[Node]:
    def find(lookup: Callable[[str], Found], name: str, key: str) -> Found | None:
        try:
            return lookup(name)
        except UnknownNameError as error:
            problems.append(Problem(("nodes", index, key), str(error)))
            return None

    devices: list[Device] = []
    for entry in table.devices:
        match = _DEVICES.match(entry)
        if match is None or match.group(1) == "0":
            problems.append(Problem(("nodes", index, "devices"), f'{entry!r} must name at least one device, such as "4x RTX3090-24GB"'))
            continue
        found = find(device, match.group(2), "devices")
        devices += [found] * int(match.group(1) or 1) if found else []
    host = find(device, table.host, "host") if table.host else None
    if host and memory:
        host = replace(host, memory=replace(host.memory, capacity_bytes=memory.value / table.hosts))
    host_link = find(link, table.host_link, "host_link")
    peer_link = find(link, table.peer_link, "peer_link") if table.peer_link else None
    nic = find(link, table.nic, "nic") if table.nic else None
    if host_link is None or not devices:
        return []
    node = Node(
        devices=tuple(devices),
        host=host,
        host_link=host_link,
        peer_link=peer_link,
        peer_group=table.peer_group,
        nic=nic,
        nics=table.nics,
        peer_shape=table.peer_shape,
        peer_reduction=table.peer_reduction,
        host_group=table.host_group,
        hosts=table.hosts,
    )
    return [node] * table.count


def _read(path: Path | Traversable) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CatalogError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _validate(path: Path | Traversable, text: str, schema: type[F]) -> F:
    try:
        return schema.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        problems = [Problem(tuple(e["loc"]), _explain(e, schema)) for e in error.errors(include_url=False)]
    raise _error(path, text, problems)


def _numbers(table: BaseModel, fields: Mapping[str, NumberField]) -> dict[str, Number]:
    found = {spec.target: getattr(table, key) for key, spec in fields.items()}
    return {target: number for target, number in found.items() if number is not None}


def _named(table: str, raw: Mapping[str, Any]) -> tuple[dict[str, Number], list[Problem]]:
    values: dict[str, Number] = {}
    problems: list[Problem] = []
    for name, entry in raw.items():
        try:
            values[name] = parse_number(entry, named_field(table, name))
        except PydanticCustomError as error:
            problems.append(Problem((table, name), error.message()))
    return values, problems


def _provenance(
    path: Path | Traversable, text: str, sources: Mapping[str, str], numbers: Mapping[str, Number], problems: list[Problem]
) -> dict[str, Provenance]:
    """Resolves source keys; raises all problems found so far at once."""
    keys = {spec.target: key for fields in (DEVICE_NUMBERS, LINK_NUMBERS, CLUSTER_NUMBERS) for key, spec in fields.items()}
    problems = list(problems)
    for target, number in numbers.items():
        if number.source not in sources:
            where = ("numbers", keys[target]) if target in keys else tuple(target.split(".", 1))
            problems.append(Problem(where, _no_source(number.source, sources)))
    if problems:
        raise _error(path, text, problems)
    return {target: Provenance(number.kind, sources[number.source]) for target, number in numbers.items()}


def _no_source(key: str, sources: Mapping[str, str]) -> str:
    near = nearest(key, sources, count=1)
    return f"source {key!r} is not in [sources]: " + (f"did you mean {near[0]!r}?" if near else f'add {key} = "..." there')


def _explain(error: ErrorDetails, schema: type[BaseModel]) -> str:
    """Says in our own words what pydantic found."""
    kind, path, context = error["type"], error["loc"], error.get("ctx", {})
    if kind == "simtrain":
        return str(error["msg"])
    if kind == "missing":
        spec = _known(path, schema).get(str(path[-1]))
        how = f'add {path[-1]} = ["...", "specification", "source key"] with {DIMENSIONS[spec.dimension]}' if spec else f"add {path[-1]}"
        return f"missing: {how}"
    if kind == "extra_forbidden":
        known = _known(path, schema)
        near = nearest(str(path[-1]), known, count=1)
        return "unknown field: " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
    if kind == "literal_error":
        return f"{error['input']!r} is not one of {context.get('expected', '')}"
    if kind in ("greater_than_equal", "too_short", "string_too_short"):
        return f"{error['input']!r} is too small: at least {context.get('ge', context.get('min_length', 1))}"
    wanted = {"string_type": "text in quotes", "int_type": "a whole number", "list_type": "a list [...]", "dict_type": "a table"}
    return f"{error['input']!r} does not fit: expected {wanted.get(kind, 'a table')}"


def _known(path: tuple[str | int, ...], schema: type[BaseModel]) -> Mapping[str, NumberField | None]:
    """Returns the fields allowed beside the one at `path`."""
    if path[0] == "numbers" and len(path) > 1:
        return {DeviceFile: DEVICE_NUMBERS, LinkFile: LINK_NUMBERS, ClusterFile: CLUSTER_NUMBERS}[schema]
    tables: Mapping[str | int, type[BaseModel]] = {"nodes": NodeTable, "network": NetworkTable}
    return dict.fromkeys((tables.get(path[0], schema) if len(path) > 1 else schema).model_fields)


def _error(path: Path | Traversable, text: str, problems: Iterable[Problem]) -> CatalogError:
    lines = text.splitlines()
    return CatalogError("\n".join(f"{path}, line {_line(lines, p.path)}, {_dotted(p.path)}: {p.text}" for p in problems))


def _dotted(path: tuple[str | int, ...]) -> str:
    return "field " + ".".join(str(part) for part in path)


def _line(lines: list[str], path: tuple[str | int, ...]) -> int:
    """Finds the line of a field: the key itself, else the table it belongs to, else the first line."""
    start = 0
    if path and path[0] in ("numbers", "architecture", "profile", "sources", "nodes", "network"):
        headers = [i for i, line in enumerate(lines) if re.match(rf"\s*\[+\s*{path[0]}\s*\]+", line)]
        occurrence = path[1] if len(path) > 1 and isinstance(path[1], int) else 0
        start = headers[occurrence] if occurrence < len(headers) else 0
    for key in reversed([part for part in path if isinstance(part, str)]):
        for i in range(start, len(lines)):
            if i > start and re.match(r"\s*\[[\[\w]", lines[i]) and start:
                break
            if re.match(rf"""\s*(?:[\w-]+\.)*["']?{re.escape(key)}["']?\s*=""", lines[i]):
                return i + 1
    return start + 1
