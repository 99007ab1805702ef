"""Convolutional networks: the residual networks of He et al. from one description.

`spec(name)` gives the numbers of a preset, `build_module(name)` the real PyTorch model (torch is imported only then).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workloads.convnet.presets import spec
from workloads.convnet.spec import ConvNetSpec

if TYPE_CHECKING:
    from workloads.convnet.module import ResNet


def build_module(model: str | ConvNetSpec, **options: Any) -> ResNet:
    """Builds the PyTorch model of a preset or a spec.

    Args:
        model: Name of a preset, or a spec.
        options: Fields of the spec to override (presets only).

    Raises:
        UnknownNameError: With the nearest names.
        InputError: An option is unknown or out of range.
    """
    from workloads.convnet.module import ResNet

    return ResNet(model if isinstance(model, ConvNetSpec) else spec(model, **options))


__all__ = ["ConvNetSpec", "build_module", "spec"]
