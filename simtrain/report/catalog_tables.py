"""Tables of what the catalogs hold: devices, clusters and workloads, in a list or one in full with the origin of every number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from simtrain.core.hardware import Cluster, Device, Link, Node, Provenance, ValueKind
from simtrain.core.precision import DType
from simtrain.core.units import format_bytes, format_flops, format_rate, format_time
from simtrain.core.workload import Layer, Workload
from simtrain.report.text import bullets, facts, plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def devices_table(devices: Iterable[Device]) -> RenderableType:
    """Returns one row per device: memory, dense peaks, power, price, and how its numbers came about."""
    numeric = ("year", "memory", "bandwidth", "fp32", "16-bit", "power", "USD/h")
    table = plain_table("", "device", "class", *numeric, "numbers", numeric=numeric)
    for d in devices:
        peak_16 = max((d.peak_flops.get(t, 0.0) for t in (DType.BF16, DType.FP16)), default=0.0)
        table.add_row(
            d.name,
            d.device_class,
            str(d.year),
            format_bytes(d.memory.capacity_bytes),
            format_rate(d.memory.bandwidth_bytes_per_s),
            format_flops(d.peak_flops[DType.FP32]) if DType.FP32 in d.peak_flops else "-",
            format_flops(peak_16) if peak_16 else "-",
            f"{d.power_w:.0f} W",
            f"{d.price_usd_per_hour:.2f}" if d.price_usd_per_hour else "-",
            _origins(d.provenance),
        )
    return table


def origins_table(devices: Iterable[Device]) -> RenderableType:
    """Returns one row per device: how many of its numbers are specified, measured, assumed and recalled, which recalled, and sums."""
    columns = ("numbers", *_WORDS.values(), _RECALLED)
    table = plain_table("", "device", *columns, "which are recalled", numeric=columns)
    total: Counter[str] = Counter()
    for d in devices:
        counted = _counted(d.provenance)
        total += counted
        recalled = ", ".join(name for name, origin in d.provenance.items() if origin.recalled)
        table.add_row(d.name, *_sums(counted), recalled or "-")
    table.add_row("all", *_sums(total), f"{total[_RECALLED] / max(total.total(), 1):.0%} of all numbers")
    return table


def device_details(device: Device) -> RenderableType:
    """Returns one device in full: every number with how it came about and its source."""
    from rich.console import Group

    head = facts(
        [
            ("device", device.name),
            ("also called", ", ".join(device.aliases) or "-"),
            ("class", f"{device.device_class}, by {device.vendor}, priced by the compute model {device.compute_model!r}"),
            ("memory", device.memory.technology),
            ("links", f"to the host {device.host_link}, to peers {device.peer_link or 'none (through the host)'}"),
        ]
    )
    return Group(head, "", _numbers_table("Numbers", device, device.provenance))


def devices_comparison(devices: Sequence[Device]) -> RenderableType:
    """Returns one row per number and one column per device, with each value over that of the first device."""
    from rich.console import Group

    names = list(dict.fromkeys(name for d in devices for name in d.provenance))
    table = plain_table("", "number", *(d.name for d in devices), numeric=tuple(d.name for d in devices))
    table.add_row("class", *(d.device_class for d in devices))
    table.add_row("memory", *(d.memory.technology for d in devices))
    table.add_row("links", *(f"{d.host_link}, {d.peer_link or 'none'}" for d in devices))
    for name in names:
        values = [_value(d, name) for d in devices]
        table.add_row(name, *(_compared(name, value, values[0]) for value in values))
    return Group(table, "", "In brackets: over the first device. Where each number comes from: simtrain devices NAME")


def _compared(name: str, value: Any, first: Any) -> str:
    if value is None:
        return "-"
    shown = _quantity(name, value)
    ratio = value / first if first and value is not first and name != "year" else 0.0
    return f"{shown} ({ratio:.2f}x)" if ratio else shown


def clusters_table(clusters: Iterable[Cluster]) -> RenderableType:
    """Returns one row per cluster: ranks, nodes, what is in them and how they are connected."""
    table = plain_table("", "cluster", "ranks", "nodes", "devices", "to host", "to peers", "network", numeric=("ranks", "nodes"))
    for c in clusters:
        counted = Counter(d.name for d in c.devices)
        table.add_row(
            c.name,
            str(c.size),
            str(len(c.nodes)),
            " + ".join(f"{count}x {name}" for name, count in counted.items()),
            _distinct(n.host_link for n in c.nodes),
            _distinct(n.peer_link for n in c.nodes),
            _distinct(n.nic for n in c.nodes),
        )
    return table


def cluster_details(cluster: Cluster) -> RenderableType:
    """Returns one cluster in full: its nodes, the numbers of its links with their sources, and what was assumed."""
    from rich.console import Group

    head = facts(
        [
            ("cluster", cluster.name),
            ("also called", ", ".join(cluster.aliases) or "-"),
            ("ranks", str(cluster.size)),
            ("between nodes", str(cluster.network)),
        ]
    )
    parts: list[RenderableType] = [head, "", _nodes_table(cluster)]
    if cluster.provenance:
        parts.append(_numbers_table("Numbers of the cluster", cluster, cluster.provenance))
    links = {k.name: k for n in cluster.nodes for k in (n.host_link, n.peer_link, n.nic) if k is not None}
    parts += [_numbers_table(f"Link {k.name} (per direction)", k, k.provenance) for k in links.values()]
    parts.append(bullets("Assumed", cluster.assumptions))
    parts.append("The numbers of its devices: simtrain devices NAME")
    return Group(*parts)


def workloads_table(workloads: Iterable[Workload]) -> RenderableType:
    """Returns one row per workload: size, depth, and the arithmetic of one sample."""
    numeric = ("parameters", "layers", "sequence", "FLOP/sample")
    table = plain_table("", "workload", *numeric, "sample", "what it is", numeric=numeric)
    for w in workloads:
        flops = f"{w.model_flops(1):.3g}"
        table.add_row(w.name, f"{w.parameter_count:,}", str(w.depth), str(w.sequence), flops, w.sample_unit, w.description)
    return table


def workload_details(workload: Workload) -> RenderableType:
    """Returns one workload in full: its layers with parameters and arithmetic, and where the architecture comes from."""
    from rich.console import Group

    head = facts(
        [
            ("workload", workload.name),
            ("what it is", workload.description or "-"),
            ("parameters", f"{workload.parameter_count:,}"),
            ("sequence", f"{workload.sequence} (per {workload.sample_unit})"),
            ("arithmetic", f"{workload.model_flops(1):.4g} FLOP per {workload.sample_unit}, forward and backward, attention in full"),
            ("source", workload.source or "not stated"),
        ]
    )
    numeric = ("repeats", "parameters each", "forward", "backward", "FLOP")
    table = plain_table("Layers (operators of one pass; FLOP of one sample in one such layer)", "layer", *numeric, numeric=numeric)
    for layer in workload.layers:
        flops = layer_flops(workload, layer)
        passes = (str(len(layer.forward)), str(len(layer.backward)))
        table.add_row(layer.name, str(layer.repeats), f"{layer.parameter_count:,}", *passes, f"{flops:.3g}")
    return Group(head, "", table)


def layer_flops(workload: Workload, layer: Layer) -> float:
    """Returns the model FLOPs of one sample in one such layer, counted as `Workload.model_flops` counts."""
    return replace(workload, layers=(replace(layer, repeats=1),)).model_flops(1)


def _nodes_table(cluster: Cluster) -> Table:
    table = plain_table("Nodes", "count", "devices", "host", "to host", "to peers", "network", numeric=("count",))
    rows: Counter[tuple[str, ...]] = Counter(_node_row(n) for n in cluster.nodes)
    for row, count in rows.items():
        table.add_row(str(count), *row)
    return table


def _node_row(node: Node) -> tuple[str, ...]:
    devices = " + ".join(f"{count}x {name}" for name, count in Counter(d.name for d in node.devices).items())
    group = f", in groups of {node.peer_group}" if node.peer_group else ""
    shape = ", direct links" if node.peer_shape == "mesh" else ""
    peers = f"{node.peer_link.name}{shape}{group}" if node.peer_link else "none (through the host)"
    network = f"{node.nics}x {node.nic.name}" if node.nic else "none"
    return devices, node.host.name if node.host else "not stated", node.host_link.name, peers, network


def _numbers_table(title: str, item: Any, provenance: Mapping[str, Provenance]) -> Table:
    table = plain_table(title, "number", "value", "how", "source", numeric=("value",))
    above = ""
    for name, origin in provenance.items():
        value = _value(item, name)
        how = f"{origin.kind.value}, {_RECALLED}" if origin.recalled else origin.kind.value
        table.add_row(name, "-" if value is None else _quantity(name, value), how, _SAME if origin.source == above else origin.source)
        above = origin.source
    return table


def _value(item: Any, dotted: str) -> Any:
    """Follows `memory.capacity_bytes` through attributes and mappings, whose keys may hold dots themselves."""
    if isinstance(item, Mapping):
        return item.get(dotted)
    head, _, rest = dotted.partition(".")
    found = getattr(item.nodes[0] if isinstance(item, Cluster) and not hasattr(item, head) else item, head, None)
    return _value(found, rest) if rest and found is not None else found


def _quantity(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    if "flops" in name:
        return format_flops(value)
    endings = {"_bytes": format_bytes, "bytes_per_s": format_rate, "_s": format_time}
    for ending, write in endings.items():
        if name.endswith(ending):
            return write(value)
    units = {"_hz": (1e-9, " GHz"), "_w": (1.0, " W"), "usd_per_hour": (1.0, " USD/h")}
    scale, unit = next((u for ending, u in units.items() if name.endswith(ending)), (1.0, ""))
    return f"{value * scale:g}{unit}"


_WORDS = {ValueKind.SPECIFICATION: "specified", ValueKind.MEASUREMENT: "measured", ValueKind.ASSUMPTION: "assumed"}
_RECALLED = "recalled"
_SAME = "(as above)"


def _origins(provenance: Mapping[str, Provenance]) -> str:
    counted = _counted(provenance)
    return ", ".join(f"{counted[word]} {word}" for word in (*_WORDS.values(), _RECALLED) if counted[word])


def _counted(provenance: Mapping[str, Provenance]) -> Counter[str]:
    """Counts numbers by how they came about; what is recalled is counted as that alone."""
    return Counter(_RECALLED if p.recalled else _WORDS[p.kind] for p in provenance.values())


def _sums(counted: Counter[str]) -> list[str]:
    return [str(counted.total()), *(str(counted[word]) for word in (*_WORDS.values(), _RECALLED))]


def _distinct(links: Iterable[Link | None]) -> str:
    return ", ".join(dict.fromkeys(link.name if link else "none" for link in links))
