"""The workload catalog: what the entry point `simtrain.workloads` names."""

from __future__ import annotations

from simtrain.core.catalog import WorkloadFactory
from workloads.convnet.presets import factories as convnets
from workloads.transformer.presets import factories as transformers
from workloads.vit.presets import factories as vision_transformers


def workloads() -> dict[str, WorkloadFactory]:
    """Returns every workload factory by name."""
    return {**transformers(), **convnets(), **vision_transformers()}
