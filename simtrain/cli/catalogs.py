"""`simtrain clusters` and `workloads`: what the catalogs hold, and where each number comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simtrain.cli.options import JsonOption, SeqLenOption
from simtrain.cli.output import plain, write_json, write_table
from simtrain.core import catalog
from simtrain.core.errors import UnknownNameError, fold
from simtrain.core.hardware import Cluster
from simtrain.core.workload import Workload

if TYPE_CHECKING:
    from rich.console import RenderableType

NameArgument = Annotated[str | None, typer.Argument(help="Show one in full, or all whose name holds this text.")]


def clusters(name: NameArgument = None, json: JsonOption = False) -> None:
    """List clusters, or show one (a preset, a .toml file or '4x rtx-3090') with its links and what was assumed."""
    from simtrain import report

    _show("clusters", name, catalog.cluster, json=json, many=report.clusters_table, one=report.cluster_details, data=_cluster_data)


def workloads(name: NameArgument = None, seq_len: SeqLenOption = None, json: JsonOption = False) -> None:
    """List workloads, or show one with its layers and where its architecture comes from."""
    from simtrain import report

    def build(preset: str) -> Workload:
        return catalog.workload(preset, seq_len=seq_len)

    _show("workloads", name, build, json=json, many=report.workloads_table, one=report.workload_details, data=workload_data)


def _show(
    group: str,
    name: str | None,
    find: Callable[[str], Any],
    *,
    json: bool,
    many: Callable[[list[Any]], RenderableType],
    one: Callable[[Any], RenderableType],
    data: Callable[[Any], Any],
) -> None:
    """Prints all items of a group, the one called `name`, or those whose name holds it."""
    items = select(group, name, find)
    if json:
        write_json({group: [data(item) for item in items]})
    elif name is not None and len(items) == 1:
        write_table(one(items[0]))
    else:
        write_table(many(items))


def select(group: str, name: str | None, find: Callable[[str], Any]) -> list[Any]:
    """Returns all items of a group, the one called `name`, or those whose name holds it.

    Raises:
        UnknownNameError: With the nearest names.
    """
    if name is None:
        return [find(known) for known in catalog.names(group)]
    try:
        return [find(name)]
    except UnknownNameError:
        part = fold(name)
        inside = [known for known in catalog.names(group) if part and part in fold(known)]
        if not inside:
            raise
        return [find(known) for known in inside]


def _cluster_data(cluster: Cluster) -> dict[str, Any]:
    fields: dict[str, Any] = plain(cluster)
    return fields | {"size": cluster.size}


def workload_data(workload: Workload) -> dict[str, Any]:
    """Returns a workload without its operators, with the counts that follow from them."""
    from simtrain.report.catalog_tables import layer_flops

    layers = [
        {
            "name": layer.name,
            "repeats": layer.repeats,
            "parameter_count": layer.parameter_count,
            "forward_operators": len(layer.forward),
            "backward_operators": len(layer.backward),
            "flops_per_sample": layer_flops(workload, layer),
        }
        for layer in workload.layers
    ]
    counts = {
        name: getattr(workload, name) for name in ("name", "sequence", "sample_unit", "description", "source", "parameter_count", "depth")
    }
    return counts | {"model_flops_per_sample": workload.model_flops(1), "layers": layers}
