"""What a vision transformer is, in numbers: the one description that the closed form and the real module are both built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simtrain.core.errors import InputError
from workloads.common.options import check_at_least, check_types, merged
from workloads.transformer.spec import TransformerSpec


@dataclass(frozen=True, slots=True)
class VitSpec:
    """A vision transformer: patches as tokens, a class token, learned positions, norms before each half of a block.

    Attributes:
        layers: Blocks.
        hidden: Width of the residual stream.
        heads: Attention heads.
        patch: Edge of a patch, in pixels.
        image_size: Edge of the square images, in pixels.
        classes: To tell apart.
        ffn: Inner width of the feed-forward part; 0 means 4 x hidden.
    """

    layers: int
    hidden: int
    heads: int
    patch: int
    image_size: int
    classes: int
    ffn: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ("patch", "image_size", "classes"))
        if self.image_size % self.patch:
            raise InputError(f"patches of {self.patch} pixels do not divide an image of {self.image_size}")
        _ = self.transformer

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Sequence length: the patches and the class token."""
        return self.patches + 1

    @property
    def transformer(self) -> TransformerSpec:
        """The spec of its blocks."""
        return TransformerSpec(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            ffn=self.ffn,
            vocabulary=self.classes,
            max_positions=self.tokens,
            sequence=self.tokens,
            causal=False,
            activation="gelu",
            norm_epsilon=1e-6,
        )

    @classmethod
    def from_options(cls, defaults: dict[str, Any], options: dict[str, Any]) -> VitSpec:
        """Builds a spec from defaults that options override.

        Raises:
            InputError: An unknown option (the nearest is suggested), a missing one, or one out of range.
        """
        required = ("layers", "hidden", "heads", "patch", "image_size", "classes")
        return cls(**merged(cls, "a vision transformer", defaults, options, required))
