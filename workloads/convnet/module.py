"""The residual network as an ordinary PyTorch module, built from the same spec as the closed form in `operators.py`.

`ResNet(spec)(images, classes)` returns the loss. Its parts `stem`, `stages` and `head` are the layers of the workload; parameters have
the shapes and the order of torchvision's `resnet18`, `resnet50` and so on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the usual name)
from torch import Tensor, nn

from workloads.convnet.spec import Block, ConvNetSpec


class Stem(nn.Module):
    """First convolution and, for large images, a max pool."""

    def __init__(self, spec: ConvNetSpec) -> None:
        super().__init__()
        large = spec.stem == "imagenet"
        self.conv1 = convolution(3, spec.width, 7, 2) if large else convolution(3, spec.width, 3)
        self.bn1 = nn.BatchNorm2d(spec.width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the first features of images."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.pool(x)  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.conv1 = convolution(block.inner, block.width, 3, block.stride)
        self.bn1 = nn.BatchNorm2d(block.width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = convolution(block.width, block.outer, 3)
        self.bn2 = nn.BatchNorm2d(block.outer)
        self.downsample = projection(block) if block.projected else None

    def forward(self, x: Tensor) -> Tensor:
        """Adds what it computes to its input."""
        shortcut = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            shortcut = self.downsample(x)
        out += shortcut
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions that squeeze and widen channels."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.conv1 = convolution(block.inner, block.width, 1)
        self.bn1 = nn.BatchNorm2d(block.width)
        self.conv2 = convolution(block.width, block.width, 3, block.stride)
        self.bn2 = nn.BatchNorm2d(block.width)
        self.conv3 = convolution(block.width, block.outer, 1)
        self.bn3 = nn.BatchNorm2d(block.outer)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(block) if block.projected else None

    def forward(self, x: Tensor) -> Tensor:
        """Adds what it computes to its input."""
        shortcut = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            shortcut = self.downsample(x)
        out += shortcut
        return self.relu(out)  # type: ignore[no-any-return]


class Head(nn.Module):
    """Classes from the mean over all pixels, and the loss."""

    def __init__(self, spec: ConvNetSpec) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(spec.features, spec.classes)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Returns the mean loss."""
        return F.cross_entropy(self.fc(self.pool(x).flatten(1)).float(), classes)


class ResNet(nn.Module):
    """A residual network with its loss.

    Args:
        spec: The model.
    """

    def __init__(self, spec: ConvNetSpec) -> None:
        super().__init__()
        block = Bottleneck if spec.bottleneck else BasicBlock
        self.spec = spec
        self.stem = Stem(spec)
        self.stages = nn.ModuleList(nn.ModuleList(block(b) for b in blocks) for blocks in spec.stages)
        self.head = Head(spec)
        self.apply(_initialize)
        if spec.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Returns the loss of a batch of images `(batch, 3, height, width)`."""
        x = self.stem(images)
        for blocks in self.stages:
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
        loss: Tensor = self.head(x, classes)
        return loss


def convolution(inner: int, outer: int, edge: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the image but for its stride."""
    return nn.Conv2d(inner, outer, edge, stride=stride, padding=edge // 2, bias=False)


def projection(block: Block) -> nn.Sequential:
    """A shortcut between different shapes."""
    return nn.Sequential(convolution(block.inner, block.outer, 1, block.stride), nn.BatchNorm2d(block.outer))


def example_batch(spec: ConvNetSpec, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns random images and classes of the shapes that the model takes.

    Args:
        spec: The model.
        batch: Samples.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, spec.image_size, spec.image_size, generator=generator)
    if spec.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(spec.classes, (batch,), generator=generator)


def _initialize(module: nn.Module) -> None:
    """Filters as in He et al. 2015: normal, with a deviation that keeps the variance of gradients."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
