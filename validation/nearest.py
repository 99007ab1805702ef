"""Published runs as evidence: those nearest to a question, predicted anew with what ships, so that errors are never out of date."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from simtrain.core.errors import InternalError, SimtrainError
from simtrain.planner.evidence import Nearby, Provider, Traits, distance, traits
from validation.layout_rows import LayoutRow
from validation.layouts import LAYOUT_SETS, LayoutSet, load_layouts
from validation.report import predict_layout


def evidence() -> Mapping[str, Provider]:
    """What this package knows of measured runs, by name."""
    return {"published layouts": nearest_layouts}


def nearest_layouts(asked: Traits, count: int) -> tuple[Nearby, ...]:
    """The nearest published runs, at most one of each source, model and number of devices, each predicted.

    Args:
        asked: What they are compared with.
        count: How many.
    """
    best: dict[tuple[str, str, int], tuple[float, tuple[str, ...], LayoutSet, LayoutRow]] = {}
    for dataset, row, own in _measured():
        apart, words = distance(asked, own)
        key = (dataset.name, row.model, row.devices)
        if key not in best or apart < best[key][0]:
            best[key] = (apart, words, dataset, row)
    chosen = sorted(best.values(), key=lambda found: found[0])[:count]
    return tuple(_nearby(*found) for found in chosen)


@cache
def _measured() -> tuple[tuple[LayoutSet, LayoutRow, Traits], ...]:
    """Rows with a step time that was measured for its own sake, whose model, machines and strategy can be stated."""
    found = []
    for dataset in (load_layouts(name) for name in LAYOUT_SETS):
        if dataset.evidence != "measured" or not dataset.timed:
            continue
        for row in dataset.rows:
            if row.outcome == "oom":
                continue
            try:
                if dataset.step_time_s(row) is not None:
                    found.append((dataset, row, traits(dataset.workload(row), dataset.cluster(row), row.strategy())))
            except InternalError:
                raise
            except SimtrainError:
                continue  # `validate published` names and counts them
    return tuple(found)


def _nearby(apart: float, words: tuple[str, ...], dataset: LayoutSet, row: LayoutRow) -> Nearby:
    measured_s = dataset.step_time_s(row) or 0.0
    source = f"{dataset.title}: {dataset.source}"
    name = f"{dataset.label(row)} ({dataset.name})"
    try:
        predicted = predict_layout(dataset, row)
    except InternalError:
        raise
    except SimtrainError:
        return Nearby(name, source, apart, words, measured_s)
    printed = dataset.memory_bytes(row)
    memory_error = predicted.memory_bytes / printed - 1 if printed and predicted.memory_bytes else None
    return Nearby(name, source, apart, words, measured_s, predicted.step_time_s, memory_error)
