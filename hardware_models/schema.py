"""The schema of device, link and cluster files: what may stand in them, and in which unit.

Every number is written as `["24 GiB", "specification", "ga102"]`: the quantity with its unit, how it came about, and the key of an
entry in `[sources]`. The tables `DEVICE_NUMBERS`, `LINK_NUMBERS` and `CLUSTER_NUMBERS` are the reference for field names and units;
the pydantic models below are built from them. `hardware_models.reading` turns files into devices, links and clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

from simtrain.core.errors import QuantityError, nearest
from simtrain.core.hardware import Provenance, ValueKind
from simtrain.core.precision import DType
from simtrain.core.units import DIMENSIONS, parse_quantity


@dataclass(frozen=True, slots=True)
class NumberField:
    """One number of a file.

    Attributes:
        target: What it fills: the name of the field in `Device`, `Link` or `Cluster`, under which its provenance is kept.
        dimension: Key of `simtrain.core.units.DIMENSIONS`.
        required: Whether a file without it is refused.
        zero: Whether zero is a sensible value.
        maximum: Largest sensible value.
        whole: Whether it must be a whole number.
    """

    target: str
    dimension: str
    required: bool = True
    zero: bool = False
    maximum: float = float("inf")
    whole: bool = False


PEAK_PATHS = (DType.FP64, DType.FP32, DType.TF32, DType.BF16, DType.FP16, DType.FP8, DType.FP4)
"""Arithmetic paths that a device file may give a dense peak for, as `peak_<path>`."""

DEVICE_NUMBERS: Mapping[str, NumberField] = {
    "year": NumberField("year", "1", whole=True),
    **{f"peak_{path}": NumberField(f"peak_flops.{path}", "FLOP/s", required=False) for path in PEAK_PATHS},
    "memory_capacity": NumberField("memory.capacity_bytes", "B"),
    "memory_bandwidth": NumberField("memory.bandwidth_bytes_per_s", "B/s"),
    "multiprocessors": NumberField("multiprocessors", "1", whole=True),
    "lanes_per_multiprocessor": NumberField("lanes_per_multiprocessor", "1", whole=True),
    "clock": NumberField("clock_hz", "Hz"),
    "cache": NumberField("cache_bytes", "B"),
    "power": NumberField("power_w", "W"),
    "idle_power": NumberField("idle_power_w", "W", required=False, zero=True),
    "price": NumberField("price_usd_per_hour", "USD/h", required=False, zero=True),
    "speed_spread": NumberField("speed_spread", "1", required=False, zero=True, maximum=0.5),
}
"""Numbers of a device file; those of `ABSENT` may be left out, and without `speed_spread` that of its class is taken (`CLASS_SPREAD`)."""

ABSENT: Mapping[str, tuple[Callable[[float], float], str]] = {
    "idle_power_w": (lambda power_w: power_w / 10, "Not stated in the file: a tenth of the power is assumed"),
    "price_usd_per_hour": (lambda _: 0.0, "Not stated in the file: zero leaves the cost out"),
}
"""What stands for a number that a device file leaves out, from its power, and what is said of it."""

CLASS_SPREAD: Mapping[str, tuple[float, Provenance]] = {
    "gpu": (
        0.017,
        Provenance(
            ValueKind.ASSUMPTION,
            "speed_spread of GPUs: fp32 products (25,536 cubed, 100 calls) on V100 boards of TACC's Longhorn, measured for Sinha et al., "
            "Not All GPUs Are Created Equal (SC 2022, arXiv 2208.11035), published as aggregated_data/sim/sgemm-longhorn-agg.csv in "
            "hal-uw/blox-pal at 1a26bbf, looked up in part: of 84 boards of one sweep the 81 that draw their 300 W have a standard "
            "deviation of 1.7 % of the time (the slowest 4.0 % above the mean; a board repeats to 0.14 %); three that heat holds below it, "
            "6 to 9 % slower, are left out as a cluster would take them out. Other GPUs are taken to differ as much",
        ),
    )
}
"""Relative standard deviation, from board to board, of what arithmetic limits, by class; other classes have none (nothing was found)."""

LINK_NUMBERS: Mapping[str, NumberField] = {
    "bandwidth": NumberField("bandwidth_bytes_per_s", "B/s"),
    "efficiency": NumberField("efficiency", "1", maximum=1.0),
    "latency": NumberField("latency_s", "s", zero=True),
}
"""Numbers of a link file."""

CLUSTER_NUMBERS: Mapping[str, NumberField] = {
    "host_power": NumberField("host_power_w", "W", zero=True),
    "host_memory": NumberField("host.memory.capacity_bytes", "B", required=False),
    "nvme_capacity": NumberField("storage.capacity_bytes", "B", required=False),
    "nvme_read": NumberField("storage.read_bytes_per_s", "B/s", required=False),
    "nvme_write": NumberField("storage.write_bytes_per_s", "B/s", required=False),
    "oversubscription": NumberField("network.oversubscription", "1", required=False),
}
"""Numbers of a cluster file; `host_memory` (of a node) replaces the capacity that the host's own file states, the three of NVMe drives (of
a node, all drives together) are given together, `oversubscription` belongs to `[network]`."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number as read: SI value, how it came about, and the key of its source."""

    value: float
    kind: ValueKind
    source: str


def parse_number(raw: Any, spec: NumberField) -> Number:
    """Reads `["24 GiB", "specification", "ga102"]`.

    Raises:
        PydanticCustomError: With a message for the person who wrote the file.
    """
    expected = DIMENSIONS[spec.dimension]
    if not (isinstance(raw, list) and len(raw) == 3 and all(isinstance(part, str) for part in raw)):
        raise _problem(f'must be written as ["value with unit", "kind", "source key"], with {expected}')
    text, kind, source = raw
    if kind not in tuple(ValueKind):
        near = nearest(kind, tuple(ValueKind), count=1)
        raise _problem(f"unknown kind {kind!r}: " + (f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(ValueKind)}"))
    try:
        value = parse_quantity(text, spec.dimension, positive=not spec.zero)
    except QuantityError as error:
        raise _problem(str(error)) from None
    if value < 0:
        raise _problem(f"{text!r} must not be negative: expected {expected}")
    if value > spec.maximum:
        raise _problem(f"{text!r} must be at most {spec.maximum:g}")
    if spec.whole and value != int(value):
        raise _problem(f"{text!r} must be a whole number")
    return Number(value, ValueKind(kind), source)


def named_field(table: str, name: str) -> NumberField:
    """Returns how to read a number of `[profile]` or `[architecture]`, whose names are open: the end of its name is its unit.

    `gemm.launch_s` is a time, `gemm.flops_per_s` and `gemm.flops_per_s.bf16` are rates of arithmetic, `norm.bytes_per_s` is a data
    rate; anything else is a plain number.
    """
    stem, _, last = name.rpartition(".")
    base = stem if last in tuple(DType) else name
    endings = {"flops_per_s": "FLOP/s", "bytes_per_s": "B/s", "_s": "s"}
    dimension = next((dimension for ending, dimension in endings.items() if base.endswith(ending)), "1")
    return NumberField(f"{table}.{name}", dimension, zero=True)


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("simtrain", "{text}", {"text": text})


def _table(name: str, fields: Mapping[str, NumberField]) -> Any:
    """Builds the model of a `[numbers]` table from its specification."""

    def reader(spec: NumberField) -> BeforeValidator:
        return BeforeValidator(lambda raw: parse_number(raw, spec))

    columns: dict[str, Any] = {
        key: (Annotated[Number, reader(spec)], ...) if spec.required else (Annotated[Number | None, reader(spec)], None)
        for key, spec in fields.items()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **columns)


class _File(BaseModel):
    """What all files share."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, strict=True)

    name: str = Field(min_length=1)
    aliases: list[str] = []
    numbers: Any
    sources: dict[str, str]


DEVICE_CLASSES = ("gpu", "cpu", "systolic", "spatial")
"""Classes with a compute model in this package; a file may name another one, with the compute model that its author brings."""


def _device_class(raw: Any) -> str:
    if not isinstance(raw, str) or not raw:
        raise _problem(f"{raw!r} does not fit: expected a class, such as {', '.join(DEVICE_CLASSES)}")
    near = nearest(raw, DEVICE_CLASSES, count=1)
    if near and raw not in DEVICE_CLASSES:
        raise _problem(f"{raw!r} is not one of {', '.join(DEVICE_CLASSES)}: did you mean {near[0]!r}?")
    return raw


class DeviceFile(_File):
    """A device: `hardware_models/devices/*.toml`; its compute model is that of its class where none is named."""

    device_class: Annotated[str, BeforeValidator(_device_class)]
    vendor: str
    compute_model: str = ""
    memory_technology: str
    host_link: str
    peer_link: str = ""
    node_size: int = Field(default=8, ge=1)
    numbers: _table("DeviceNumbers", DEVICE_NUMBERS)  # type: ignore[valid-type]
    architecture: dict[str, Any] = {}
    profile: dict[str, Any] = {}


class LinkFile(_File):
    """A kind of link: `hardware_models/links/*.toml`."""

    numbers: _table("LinkNumbers", LINK_NUMBERS)  # type: ignore[valid-type]


class NodeTable(BaseModel):
    """One `[[nodes]]` table of a cluster file: `count` equal machines."""

    model_config = ConfigDict(extra="forbid", strict=True)

    devices: list[str] = Field(min_length=1)
    host_link: str
    count: int = Field(default=1, ge=1)
    host: str = ""
    hosts: int = Field(default=1, ge=1)
    peer_link: str = ""
    peer_group: int = Field(default=0, ge=0)
    nic: str = ""
    nics: int = Field(default=1, ge=1)
    peer_shape: Literal["switch", "mesh"] = "switch"
    peer_reduction: bool = False
    host_group: int = Field(default=0, ge=0)


class NetworkTable(BaseModel):
    """The `[network]` table of a cluster file; `source` is the source key of what it says. Fields as in `simtrain.core.network`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str
    source: str
    nodes_per_group: int = Field(default=0, ge=0)
    dimensions: list[int] = []
    wraparound: list[bool] = []
    in_network_reduction: bool = False


class ClusterFile(_File):
    """A cluster: `hardware_models/clusters/*.toml`. `structure` is the source key of its counts of nodes, devices and ports."""

    structure: str
    assumptions: list[str] = []
    nodes: list[NodeTable] = Field(min_length=1)
    network: NetworkTable | None = None
    numbers: _table("ClusterNumbers", CLUSTER_NUMBERS)  # type: ignore[valid-type]
