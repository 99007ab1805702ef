"""The image families by name: spec, closed form, real module and batch."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

import workloads.convnet
import workloads.convnet.module
import workloads.convnet.operators
import workloads.vit
import workloads.vit.module
import workloads.vit.operators
from simtrain.core.workload import Workload

FAMILIES: dict[str, ModuleType] = {"resnet": workloads.convnet, "vit": workloads.vit}


@dataclass(frozen=True)
class ImageModel:
    """One model of a family, real and as lists."""

    spec: Any
    work: Workload
    build: Callable[..., nn.Module]
    batch_of: Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def image_model(preset: str, **options: Any) -> ImageModel:
    family = FAMILIES["vit" if preset.startswith("vit") else "resnet"]
    spec = family.spec(preset, **options)

    def build(**choices: Any) -> nn.Module:
        torch.manual_seed(0)
        return family.build_module(spec, **choices)

    return ImageModel(spec, family.operators.workload(spec), build, lambda batch: family.module.example_batch(spec, batch))


def all_flops(work: Workload, batch: int) -> float:
    return sum(op.flops(batch, work.sequence) for layer in work for op in layer.forward + layer.backward)
