"""Transformers: GPT, Llama and BERT from one description.

`spec(name)` gives the numbers of a preset, `build_module(name)` the real PyTorch model (torch is imported only then).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from workloads.transformer.presets import spec
from workloads.transformer.spec import TransformerSpec

if TYPE_CHECKING:
    from workloads.transformer.module import Transformer


def build_module(model: str | TransformerSpec, *, attention: Literal["fused", "unfused"] = "fused", **options: Any) -> Transformer:
    """Builds the PyTorch model of a preset or a spec.

    Args:
        model: Name of a preset, or a spec.
        attention: One operator, or the score matrix in memory.
        options: Fields of the spec to override (presets only).

    Raises:
        UnknownNameError: With the nearest names.
        InputError: An option is unknown or out of range.
    """
    from workloads.transformer.module import Transformer

    return Transformer(model if isinstance(model, TransformerSpec) else spec(model, **options), attention)


__all__ = ["TransformerSpec", "build_module", "spec"]
