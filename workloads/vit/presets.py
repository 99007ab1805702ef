"""Reads `presets.toml` and makes a catalog entry of each preset and family."""

from __future__ import annotations

from typing import Any

from workloads.common.presets import Family, Preset
from workloads.vit.operators import workload
from workloads.vit.spec import VitSpec

FAMILY = Family("vision transformer", "workloads.vit", VitSpec.from_options, workload)


def factories() -> dict[str, Preset[VitSpec]]:
    """Returns the presets and families by name."""
    return FAMILY.presets


def spec(name: str, **options: Any) -> VitSpec:
    """Returns the spec of a preset, by name or alias.

    Args:
        name: Such as "vit-base".
        options: Fields to override.

    Raises:
        UnknownNameError: With the nearest names.
        InputError: An option is unknown or out of range.
    """
    return FAMILY.spec(name, **options)
