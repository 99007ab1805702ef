"""A real PyTorch training step of a model family, as a strategy asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from simtrain.core.errors import InputError, UnsupportedError
from simtrain.core.precision import precision
from simtrain.core.strategy import Strategy, checkpoint_segment
from simtrain.torch.files import example
from simtrain.torch.recorder import batch_tensors
from simtrain.torch.sizes import batch_shape
from simtrain.torch.subject import call_model, find_loss
from validation.backend import Backend, CpuBackend
from validation.steps import TrainingStep
from workloads.convnet import module as convnet
from workloads.convnet import presets as convnets
from workloads.transformer import module as transformer
from workloads.transformer import presets as transformers
from workloads.vit import module as vit
from workloads.vit import presets as vits

LEARNING_RATE = 1e-4
CAPTURE = "capture:"
"""Begins the name of a workload that is a model of the user's own."""


class Segment(nn.Module):
    """Blocks whose activations are thrown away after the forward pass and computed again in the backward pass."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def _run(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, *rest)
        return x

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Runs the blocks under `torch.utils.checkpoint` (no random numbers to restore: there is no dropout)."""
        return cast(torch.Tensor, checkpoint(self._run, x, *rest, use_reentrant=False, preserve_rng_state=False))


class Training:
    """A model, its data and its optimizer.

    Args:
        step: What is trained, and how.
        device: Where; the processor by default.
        seed: Of weights and data.

    Attributes:
        model: The real module of the family.
        optimizer: As the strategy names it, with PyTorch's defaults.
    """

    def __init__(self, step: TrainingStep, device: Backend | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        strategy, device = step.parsed(), device or CpuBackend()
        self._autocast = device.autocast(strategy.precision)
        self.model, self.batch = on_device(build(step, seed), device.torch_device)
        apply_checkpointing(self.model, strategy)
        self.optimizer = build_optimizer(self.model, strategy.optimizer)
        self.accumulation = strategy.accumulation
        scales = precision(strategy.precision).loss_scaling
        self._scaler = torch.amp.GradScaler(torch.device(device.torch_device).type) if scales else None

    def passes(self) -> None:
        """Clears gradients, then runs forward and backward of every micro-batch."""
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.accumulation):
            with self._autocast():
                loss = self.model(*self.batch)
            if self.accumulation > 1:
                loss = loss / self.accumulation
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def update(self) -> None:
        """Runs the optimizer, under loss scaling if the precision has it."""
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()

    def step(self) -> None:
        """Runs one whole training step."""
        self.passes()
        self.update()


def on_device(built: tuple[nn.Module, tuple[Any, ...]], torch_device: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Moves a model and its batch."""
    model, batch = built
    return model.to(torch_device), tree_map(lambda x: x.to(torch_device) if isinstance(x, torch.Tensor) else x, batch)


def build(step: TrainingStep, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """Returns the real module of a training step's family, and a batch for it.

    Args:
        step: Which model, how many samples.
        seed: Of the random numbers of the batch.
    """
    samples = step.parsed().micro_batch
    if step.workload.startswith(CAPTURE):
        return _user_model(step.workload.removeprefix(CAPTURE), samples, step.sequence)
    if step.workload in convnets.FAMILY.presets:
        network = convnets.spec(step.workload, **step.options)
        return convnet.ResNet(network), convnet.example_batch(network, samples, seed=seed)
    if step.workload in vits.FAMILY.presets:
        images = vits.spec(step.workload, **step.options)
        return vit.VisionTransformer(images, step.attention), vit.example_batch(images, samples, seed=seed)
    text = transformers.spec(step.workload, **step.options)
    batch = transformer.example_batch(text, samples, step.sequence, seed=seed)
    return transformer.Transformer(text, step.attention), batch


class UserModel(nn.Module):
    """A model of the user's own together with its loss: called with its batch, it returns the loss.

    Args:
        module: The model.
        loss: Makes the loss from the output and the batch, where the output is not the loss or holds it.
    """

    def __init__(self, module: nn.Module, loss: Callable[[Any, Any], torch.Tensor] | None) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> torch.Tensor:
        """Returns the loss."""
        output = call_model(self.module, batch)
        return self.loss(output, batch) if self.loss is not None else find_loss(output)


def _user_model(text: str, samples: int, sequence: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """Builds what `FILE.py:FUNCTION` returns for real, its example batch cut or repeated to a size.

    Args:
        text: As `capture:` reads it.
        samples: Of the batch.
        sequence: Sequence length; that of the example for 0.

    Raises:
        InputError: The function fails or returns no model.
    """
    given = example(text)
    model, batch = given["model"], given["batch"]
    module = model if isinstance(model, nn.Module) else model()
    if not isinstance(module, nn.Module):
        raise InputError(f"{text} gives a {type(module).__name__} as its model, not a torch.nn.Module")
    shape = batch_shape(batch_tensors(batch), given.get("sequence_dim", "auto"))
    resized = shape.resize(batch, (samples, sequence or shape.sequence or 1))
    return UserModel(module.train(), given.get("loss")), (resized,)


def apply_checkpointing(model: nn.Module, strategy: Strategy) -> None:
    """Groups the model's blocks into segments that are recomputed."""
    if strategy.checkpoint == "none":
        return
    if not hasattr(model, "blocks"):
        raise UnsupportedError(f"checkpointing of {type(model).__name__} cannot be measured: its blocks are not safe to recompute")
    blocks = list(cast(nn.ModuleList, model.blocks))
    length = checkpoint_segment(strategy.checkpoint, len(blocks))
    if length:
        model.blocks = nn.ModuleList(Segment(blocks[i : i + length]) for i in range(0, len(blocks), length))


def build_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Returns the optimizer that a strategy names.

    Raises:
        UnsupportedError: No such optimizer is set up here.
    """
    parameters = list(model.parameters())
    if name in ("adamw", "adam"):
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return kind(parameters, lr=LEARNING_RATE)
    if name in ("sgd", "sgd-momentum"):
        return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9 if name == "sgd-momentum" else 0.0)
    raise UnsupportedError(f"optimizer {name!r} cannot be measured")
