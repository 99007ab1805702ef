"""The workload catalog: what the entry point `simtrain.workloads` names."""

from __future__ import annotations

from simtrain.core.catalog import WorkloadFactory
from workloads.convnet.presets import FAMILY as CONVNETS
from workloads.transformer.presets import FAMILY as TRANSFORMERS
from workloads.vit.presets import FAMILY as VISION_TRANSFORMERS


def workloads() -> dict[str, WorkloadFactory]:
    """Returns every workload factory by name."""
    return {**TRANSFORMERS.presets, **CONVNETS.presets, **VISION_TRANSFORMERS.presets}
