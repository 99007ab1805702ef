"""Reads `presets.toml` and makes a catalog entry of each preset and family."""

from __future__ import annotations

from typing import Any

from workloads.common.presets import Family, Preset
from workloads.transformer.operators import workload
from workloads.transformer.spec import TransformerSpec

FAMILY = Family("transformer", "workloads.transformer", TransformerSpec.from_options, workload, free_length=True)


def factories() -> dict[str, Preset[TransformerSpec]]:
    """Returns the presets and families by name."""
    return FAMILY.presets


def spec(name: str, **options: Any) -> TransformerSpec:
    """Returns the spec of a preset, by name or alias.

    Args:
        name: Such as "gpt2-small".
        options: Fields to override.

    Raises:
        UnknownNameError: With the nearest names.
        InputError: An option is unknown or out of range.
    """
    return FAMILY.spec(name, **options)
