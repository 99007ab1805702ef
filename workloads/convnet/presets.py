"""Reads `presets.toml` and makes a catalog entry of each preset and family."""

from __future__ import annotations

from typing import Any

from workloads.common.presets import Family, Preset
from workloads.convnet.operators import workload
from workloads.convnet.spec import ConvNetSpec

FAMILY = Family("convolutional network", "workloads.convnet", ConvNetSpec.from_options, workload)


def factories() -> dict[str, Preset[ConvNetSpec]]:
    """Returns the presets and families by name."""
    return FAMILY.presets


def spec(name: str, **options: Any) -> ConvNetSpec:
    """Returns the spec of a preset, by name or alias.

    Args:
        name: Such as "resnet50".
        options: Fields to override.

    Raises:
        UnknownNameError: With the nearest names.
        InputError: An option is unknown or out of range.
    """
    return FAMILY.spec(name, **options)
