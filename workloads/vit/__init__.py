"""Vision transformers for classification from one description.

`spec(name)` gives the numbers of a preset, `build_module(name)` the real PyTorch model (torch is imported only then).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from workloads.vit.presets import spec
from workloads.vit.spec import VitSpec

if TYPE_CHECKING:
    from workloads.vit.module import VisionTransformer


def build_module(model: str | VitSpec, *, attention: Literal["fused", "unfused"] = "fused", **options: Any) -> VisionTransformer:
    """Builds the PyTorch model of a preset or a spec.

    Args:
        model: Name of a preset, or a spec.
        attention: One operator, or the score matrix in memory.
        options: Fields of the spec to override (presets only).

    Raises:
        UnknownNameError: With the nearest names.
        InputError: An option is unknown or out of range.
    """
    from workloads.vit.module import VisionTransformer

    return VisionTransformer(model if isinstance(model, VitSpec) else spec(model, **options), attention)


__all__ = ["VitSpec", "build_module", "spec"]
