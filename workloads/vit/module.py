"""The vision transformer as an ordinary PyTorch module, built from the same spec as the closed form in `operators.py`.

`VisionTransformer(spec)(images, classes)` returns the loss. Its parts `embedding`, `blocks` and `head` are the layers of the workload;
parameters have the shapes and the order of timm's `vit_base_patch16_224` and its like.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the usual name)
from torch import Tensor, nn

from workloads.transformer.attention_module import AttentionForm
from workloads.transformer.module import PreNormBlock
from workloads.vit.spec import VitSpec


class Embedding(nn.Module):
    """Patches of an image as tokens, a class token before them, positions added."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, spec.hidden))
        self.positions = nn.Parameter(0.02 * torch.randn(1, spec.tokens, spec.hidden))
        self.proj = nn.Conv2d(3, spec.hidden, spec.patch, stride=spec.patch)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the residual stream's start."""
        x = self.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions


class Head(nn.Module):
    """Classes from the class token, and the loss."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.hidden, eps=spec.transformer.norm_epsilon)
        self.linear = nn.Linear(spec.hidden, spec.classes)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Returns the mean loss."""
        token = self.norm(x)[:, 0]
        return F.cross_entropy(self.linear(token).float(), classes)


class VisionTransformer(nn.Module):
    """A vision transformer with its loss.

    Args:
        spec: The model.
        attention: "fused" or "unfused".
    """

    def __init__(self, spec: VitSpec, attention: AttentionForm = "fused") -> None:
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(spec)
        self.blocks = nn.ModuleList(PreNormBlock(spec.transformer, attention, has_experts=False) for _ in range(spec.layers))
        self.head = Head(spec)
        self.apply(_initialize)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Returns the loss of a batch of images `(batch, 3, height, width)`."""
        x = self.embedding(images)
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x, classes)
        return loss


def example_batch(spec: VitSpec, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns random images and classes of the shapes that the model takes.

    Args:
        spec: The model.
        batch: Samples.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, spec.image_size, spec.image_size, generator=generator)
    return images, torch.randint(spec.classes, (batch,), generator=generator)


def _initialize(module: nn.Module) -> None:
    """Weights normal with a deviation of 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
