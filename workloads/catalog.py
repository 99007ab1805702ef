"""The workload catalog: what the entry point `simtrain.workloads` names."""

from __future__ import annotations

from simtrain.core.catalog import WorkloadFactory
from workloads.transformer.presets import factories


def workloads() -> dict[str, WorkloadFactory]:
    """Returns every workload factory by name."""
    return dict(factories())
