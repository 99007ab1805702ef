"""What a residual network is, in numbers: the one description that the closed form and the real module are both built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from workloads.common.options import check_at_least, check_types, merged

Depth = Literal[18, 34, 50, 101, 152]
Stem = Literal["imagenet", "cifar"]

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks of the four stages by depth (He et al. 2016, table 1)."""


@dataclass(frozen=True, slots=True)
class Block:
    """One residual block.

    Attributes:
        inner: Channels read.
        width: Channels of its 3x3 convolution.
        outer: Channels written.
        stride: Of its 3x3 convolution.
        pixels_in: Read, for one sample and channel.
        pixels: Written, for one sample and channel.
    """

    inner: int
    width: int
    outer: int
    stride: int
    pixels_in: int
    pixels: int

    @property
    def projected(self) -> bool:
        """Whether the shortcut is a convolution, because shapes differ."""
        return self.stride != 1 or self.inner != self.outer


@dataclass(frozen=True, slots=True)
class ConvNetSpec:
    """A residual network for classification.

    Attributes:
        depth: Layers with weights; up to 34 blocks have two 3x3 convolutions, above 1x1, 3x3 and 1x1 with four times the channels.
        stem: "imagenet" starts with 7x7 at stride 2 and a max pool, "cifar" with 3x3 and no pool.
        image_size: Edge of the square images, in pixels.
        classes: To tell apart.
        width: Channels of the stem.
        channels_last: Whether images and filters have their channels last in memory (NHWC) rather than as PyTorch makes them (NCHW).
        recomputable: Whether checkpointing may run batch norms twice (they then update their running statistics twice).
    """

    depth: Depth
    image_size: int
    classes: int
    stem: Stem = "imagenet"
    width: int = 64
    channels_last: bool = False
    recomputable: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ("image_size", "classes", "width"))

    @property
    def bottleneck(self) -> bool:
        """Whether blocks squeeze channels."""
        return self.depth >= 50

    @property
    def stem_edge(self) -> int:
        """Edge of what the stem's convolution writes, in pixels."""
        return halved(self.image_size) if self.stem == "imagenet" else self.image_size

    @property
    def first_edge(self) -> int:
        """Edge of what the first stage reads, in pixels."""
        return halved(self.stem_edge) if self.stem == "imagenet" else self.stem_edge

    @property
    def features(self) -> int:
        """Channels that the head reads."""
        return self.width * 8 * (4 if self.bottleneck else 1)

    @property
    def stages(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each stage."""
        stages = []
        inner, edge = self.width, self.first_edge
        for index, count in enumerate(BLOCKS[self.depth]):
            blocks = []
            width = self.width * 2**index
            outer = width * (4 if self.bottleneck else 1)
            for number in range(count):
                stride = 2 if index and not number else 1
                before, edge = edge, halved(edge) if stride == 2 else edge
                blocks.append(Block(inner, width, outer, stride, before**2, edge**2))
                inner = outer
            stages.append(tuple(blocks))
        return tuple(stages)

    @classmethod
    def from_options(cls, defaults: dict[str, Any], options: dict[str, Any]) -> ConvNetSpec:
        """Builds a spec from defaults that options override.

        Raises:
            InputError: An unknown option (the nearest is suggested), a missing one, or one out of range.
        """
        return cls(**merged(cls, "a convolutional network", defaults, options, ("depth", "image_size", "classes")))


def halved(edge: int) -> int:
    """Edge after a stride of 2, with the usual padding."""
    return (edge + 1) // 2
