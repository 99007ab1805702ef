"""Carries a strategy out on a real model: tensorized layers, recomputation, autocast, loss scaling, accumulation, offload, wrapping."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from simtrain.core.checkpoint import is_explicit, is_optimal, parse_blocks
from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from simtrain.core.precision import DType, Precision, precision
from simtrain.core.strategy import Strategy, checkpoint_segment
from simtrain.core.tensorize import parse_tensorize
from simtrain.torch.formats import DTYPES, BlockFormats
from simtrain.torch.narrow import check_narrow, quantize_blocks
from simtrain.torch.offloaded import ActivationOffload, offloaded_blocks
from simtrain.torch.pieces import block_paths
from simtrain.torch.recompute import Recomputation, block_segments, check_names
from simtrain.torch.tensor_conversion import Converted, tensorize_blocks

CORE = "core_attention"
"""What Megatron-LM, too, calls the module from queries, keys and values to their mixture (recalled, not looked up)."""

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "sgd-momentum": torch.optim.SGD}


class Applied:
    """A strategy at work in a training loop.

    ```python
    applied = st.torch.apply(strategy, model, optimizer)
    for batch in batches:
        with applied.forward():
            loss = applied.model(*batch)
        applied.backward(loss)                         # every micro-batch; after the last of a step the optimizer runs
    ```

    Attributes:
        strategy: What is carried out.
        model: What to call: the model given, or its data-parallel wrapper.
        optimizer: The one given.
        blocks: Module paths of the blocks, in order; their numbers are those of `checkpoint=layers:...`.
        notes: What is not carried out as the strategy says, in words.
        offloaded: What moves the activations of blocks; `None` where they stay.
        tensorized: Layers of the blocks that were converted, with their ranks and errors.
        narrow: Layers of the blocks whose products run in fp8.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        blocks: Sequence[str],
        *,
        batch_norms: bool = False,
    ) -> None:
        self.strategy, self.optimizer, self.blocks = strategy, optimizer, tuple(blocks)
        self._precision = precision(strategy.precision)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.notes: list[str] = []
        self.narrow: tuple[str, ...] = ()
        if self._precision.narrow is not None:
            self.notes.append(check_narrow(self._precision, model, self._device))
            self.narrow = quantize_blocks(model, self.blocks)
        self.tensorized = _tensorized(strategy, model, optimizer, self.blocks)
        self._recomputation = _recomputation(strategy, model, self.blocks, batch_norms=batch_norms)
        self.offloaded = self._offloaded(model)
        self._formats = BlockFormats(model, self.blocks, self._precision) if self._precision.layers else None
        self.model = _wrapped(strategy, model, optimizer, self.blocks)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._precision.loss_scaling)
        self._done = 0

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Names of the blocks that are recomputed."""
        return self._recomputation.recomputed

    @property
    def kept(self) -> dict[str, str]:
        """Blocks that the strategy recomputes and that are kept, with the reason: running them twice would not be the same."""
        return dict(self._recomputation.kept)

    @contextmanager
    def forward(self) -> Generator[None, None, None]:
        """Surrounds a forward pass: autocast, and no reduction of gradients before the last micro-batch of a step."""
        last = self._done % self.strategy.accumulation == self.strategy.accumulation - 1
        with ExitStack() as stack:
            if self.strategy.data > 1 and self.strategy.zero == 0 and not last:
                stack.enter_context(self.model.no_sync())  # type: ignore[operator]
            elif self.strategy.data > 1 and self.strategy.zero == 3:
                self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            stack.enter_context(self._formats.forward() if self._formats else _autocast(self._precision, self._device.type))
            yield

    def backward(self, loss: Tensor) -> bool:
        """Runs backward on a micro-batch's share of the loss and, after the last micro-batch of a step, the optimizer.

        Returns:
            Whether the optimizer ran; gradients are cleared then.
        """
        share = loss / self.strategy.accumulation if self.strategy.accumulation > 1 else loss
        self._scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        self._done += 1
        if self._done % self.strategy.accumulation:
            return False
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _offloaded(self, model: nn.Module) -> ActivationOffload | None:
        """Moves the activations that the strategy moves, unless the model is where they would go."""
        if not self.strategy.moved.activations:
            return None
        if self._device.type == "cpu":
            self.notes.append("activations are not offloaded: the model is on the CPU already")
            return None
        chosen = offloaded_blocks(self.strategy, self.blocks)
        if both := [name for name in chosen if name in self.recomputed]:
            self.notes.append(f"recomputed blocks keep their inputs on the device, which PyTorch's checkpoints hold: {', '.join(both)}")
        return ActivationOffload(model, chosen, recomputed=self.recomputed)


def apply(
    strategy: Strategy | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    blocks: Sequence[str] | None = None,
    recompute_batch_norms: bool = False,
) -> Applied:
    """Carries a strategy out on a model, in three lines of a normal training loop; see `Applied`.

    Gradients are those of the untouched model: bit by bit in fp32 where the arithmetic is the same (recomputation, offload).
    Recomputation replays PyTorch's random numbers, so that dropout may be recomputed; blocks that must not run twice are kept, and
    `Applied.kept` names them. With `precision=fp8-current` linear layers in the blocks of a bf16 model multiply in fp8. With `tensorize`,
    layers of the blocks are converted in place, by singular values, first of all, and the optimizer gets their factors; gradients are
    those of the converted model, and `Applied.tensorized` says how much each weight lost.

    Args:
        strategy: With `checkpoint` as "none", "full", "sqrt", "every:K", explicit blocks, or "selective" for blocks whose unfused attention
            is a module `core_attention`; what "optimal" stands for depends on the machines, and `st.choose_checkpoint` tells.
        model: Left as it is but for hooks on its blocks (sharded parameters with `zero=3`, converted layers with `tensorize`).
        optimizer: Of its parameters.
        blocks: Module paths of the blocks, in the order in which they run; by default those that a capture finds (children of
            `ModuleList` and `Sequential`).
        recompute_batch_norms: Recompute blocks with batch norms too. Gradients stay the same; running statistics are updated twice.

    Raises:
        InputError: Blocks that do not exist, or an optimizer of another kind than the strategy's.
        StrategyError: An undecided or impossible choice of blocks, or fewer processes than the strategy needs.
        UnsupportedError: A form of parallelism or precision that is not carried out here.
    """
    how = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    _refuse(how, optimizer)
    found = list(blocks) if blocks is not None else _found(model)
    check_names(model, found, dict(model.named_modules()))
    return Applied(how, model, optimizer, found, batch_norms=recompute_batch_norms)


def _found(model: nn.Module) -> list[str]:
    paths = block_paths(model)
    return [name for name, _ in model.named_modules() if name in paths]


def _refuse(strategy: Strategy, optimizer: torch.optim.Optimizer) -> None:
    for name in ("tensor", "pipeline", "context", "expert"):
        if getattr(strategy, name) > 1:
            raise UnsupportedError(
                f"{name}={getattr(strategy, name)} is not carried out here, it changes the model itself: only data parallelism is"
            )
    for name in ("sequence_parallel", "compression", "low_communication", "plan", "cuts", "chunks"):
        plain = {f.name: f.default for f in fields(Strategy)}[name]
        if (given := getattr(strategy, name)) != plain:
            raise UnsupportedError(f"{name}={given} is not carried out here, and what is predicted with it would not hold: leave it out")
    if strategy.zero in (1, 2) or strategy.shard:
        raise UnsupportedError("zero=1, zero=2 and shard are not carried out here: use zero=0 (DDP) or zero=3 (FSDP2)")
    if strategy.moved.optimizer or strategy.moved.activations == "nvme":
        raise UnsupportedError(
            f"offload={strategy.offload}: only activations are moved here, to host memory (offload=activations); optimizer, gradients and "
            "weights are DeepSpeed's to move"
        )
    if is_optimal(strategy.checkpoint):
        raise StrategyError(
            f"checkpoint={strategy.checkpoint} depends on the machines: "
            "st.choose_checkpoint(workload, cluster, strategy) puts blocks in its place"
        )
    if strategy.checkpoint == "selective-op":
        raise UnsupportedError("checkpoint=selective-op is not carried out here: only modules are wrapped; use none, full or layers:...")
    _refuse_precision(strategy)
    kind, wanted = type(optimizer), _OPTIMIZERS.get(strategy.optimizer)
    if kind in _OPTIMIZERS.values() and kind is not wanted and strategy.optimizer != "muon":
        raise InputError(
            f"the strategy says optimizer={strategy.optimizer}, but the optimizer is {kind.__name__}: predictions would not hold"
        )
    world = torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1
    if world != strategy.data:
        raise StrategyError(
            f"data={strategy.data}, but there are {world} processes: start as many with torchrun and call init_process_group"
        )


def _refuse_precision(strategy: Strategy) -> None:
    recipe = precision(strategy.precision)
    if recipe.budget is not None:
        raise StrategyError(
            f"precision={recipe.name} depends on the machines: st.choose_precision(workload, cluster, strategy) puts recipes in its place"
        )
    if recipe.narrow is not None and (strategy.tensorize != "none" or strategy.data > 1):
        raise UnsupportedError(f"precision={recipe.name} is carried out with tensorize=none and data=1 alone: use these, or an -amp recipe")
    if recipe.parameter is not DType.FP32 and recipe.narrow is None:
        raise UnsupportedError(
            f"precision={recipe.name} stores weights in 16 bit, which is the model's and the optimizer's to do: use fp32 or an -amp recipe"
        )


def _recomputation(strategy: Strategy, model: nn.Module, blocks: Sequence[str], *, batch_norms: bool) -> Recomputation:
    """Whole blocks, or inside each the module that makes scores.

    Raises:
        UnsupportedError: There is no such module.
    """
    if strategy.checkpoint != "selective":
        return Recomputation(model, blocks, _segments(strategy, blocks), batch_norms=batch_norms)
    inside = tuple(f"{block}." for block in blocks)
    cores = [name for name, _ in model.named_modules() if name.startswith(inside) and name.rpartition(".")[2] == CORE]
    if not cores:
        raise UnsupportedError(
            f"checkpoint=selective makes attention's scores again, inside a module {CORE!r} of each block that takes queries, keys and "
            f"values; {type(model).__name__} has none, and fused attention keeps no scores: use none, full or layers:..."
        )
    return Recomputation(model, cores, [(i, i + 1) for i in range(len(cores))], batch_norms=batch_norms)


def _segments(strategy: Strategy, blocks: Sequence[str]) -> tuple[tuple[int, int], ...]:
    if strategy.checkpoint == "none":
        return ()
    if not blocks:
        raise StrategyError(f"checkpoint={strategy.checkpoint}: no blocks were found in the model; name them with blocks=[...]")
    if not is_explicit(strategy.checkpoint):
        return block_segments(checkpoint_segment(strategy.checkpoint, len(blocks)), len(blocks))
    chosen = parse_blocks(strategy.checkpoint)
    if chosen[-1][1] > len(blocks):
        raise StrategyError(f"checkpoint={strategy.checkpoint}: the model has blocks 0 ({blocks[0]}) to {len(blocks) - 1} ({blocks[-1]})")
    return chosen


def _tensorized(strategy: Strategy, model: nn.Module, optimizer: torch.optim.Optimizer, blocks: Sequence[str]) -> tuple[Converted, ...]:
    """Converts the layers of the blocks and gives the optimizer their factors in place of their weights.

    Raises:
        StrategyError: No layer becomes smaller, or the optimizer has run already.
    """
    form = parse_tensorize(strategy.tensorize)
    if form is None:
        return ()
    if optimizer.state:
        raise StrategyError(
            f"tensorize={strategy.tensorize} makes new parameters, for which an optimizer that has run has no state: apply before "
            "the first step"
        )
    before = {id(p): name for name, p in model.named_parameters()}
    places = [[before.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    found = tensorize_blocks(model, blocks, form)
    if not found:
        raise StrategyError(f"tensorize={strategy.tensorize} makes no layer in the blocks of {type(model).__name__} smaller")
    after = dict(model.named_parameters())
    factors = {f"{c.name}.weight": [n for n in after if n.startswith(f"{c.name}.") and not n.endswith("bias")] for c in found}
    biases = {f"{c.name}.bias": [n for n in after if n.startswith(f"{c.name}.") and n.endswith("bias")] for c in found}
    made = factors | biases
    for group, names in zip(optimizer.param_groups, places, strict=True):
        given = zip(names, group["params"], strict=True)
        group["params"] = [q for name, p in given for q in ([after[n] for n in made[name]] if name in made else [p])]
    return found


def _autocast(recipe: Precision, device: str) -> AbstractContextManager[Any]:
    if recipe.arithmetic is DType.TF32:
        torch.set_float32_matmul_precision("high")
    return torch.autocast(device, dtype=DTYPES[recipe.low]) if recipe.autocast else nullcontext()


def _wrapped(strategy: Strategy, model: nn.Module, optimizer: torch.optim.Optimizer, blocks: Sequence[str]) -> nn.Module:
    """Wraps the model for its data-parallel ranks: DDP, or FSDP2 block by block with the optimizer pointed to the shards.

    Raises:
        StrategyError: An optimizer whose state exists already, which would not be sharded.
    """
    if strategy.data == 1:
        return model
    if strategy.zero == 0:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    if optimizer.state:
        raise StrategyError(
            "zero=3 shards parameters, which an optimizer that has run already does not follow: apply before the first step"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    places = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    modules = dict(model.named_modules())
    for name in blocks:
        fully_shard(modules[name])
    fully_shard(model)
    sharded = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, places, strict=True):
        group["params"] = [sharded[name] for name in members]
    return model


__all__ = ["Applied", "apply"]
