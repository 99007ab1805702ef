"""Peaks of whole steps of image models: the ledger against the events of PyTorch's allocator, copies inside of oneDNN included."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from simtrain.core.runtimes import runtime
from simtrain.core.strategy import Strategy
from tests.step.books import ledger_of
from tests.workloads.image_models import image_model
from validation.allocation_peak import allocation_peak_bytes
from validation.training import build_optimizer

CPU = runtime("torch-eager-cpu")

STEPS: dict[str, tuple[str, dict[str, Any], str]] = {
    "resnet18": ("resnet18", {"image_size": 64}, "micro_batch=4,optimizer=sgd-momentum"),
    "small": ("resnet", {}, "micro_batch=16,optimizer=sgd"),
    "bottlenecks": ("resnet", {"depth": 50, "image_size": 96}, "micro_batch=16,optimizer=sgd"),
    "small batch, 1x1 convolutions without copies": ("resnet", {"depth": 50, "image_size": 96}, "micro_batch=8,optimizer=adamw"),
    "accumulation": ("resnet", {"depth": 50}, "micro_batch=16,optimizer=sgd,accumulation=3"),
    "channels last": ("resnet", {"channels_last": True, "image_size": 96}, "micro_batch=8,optimizer=sgd"),
    "autocast": ("resnet", {"depth": 50, "image_size": 96}, "micro_batch=16,optimizer=sgd,precision=bf16-amp"),
    "vit": ("vit", {"hidden": 96, "layers": 3}, "micro_batch=8,optimizer=adamw"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured_bytes(model: Any, strategy: Strategy, change: Any = lambda module: None) -> int:
    casts = (lambda: torch.autocast("cpu", torch.bfloat16)) if strategy.precision == "bf16-amp" else nullcontext

    def run() -> None:
        module, batch = model.build(), model.batch_of(strategy.micro_batch)
        change(module)
        optimizer = build_optimizer(module, strategy.optimizer)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            for _ in range(strategy.accumulation):
                with casts():
                    loss = module(*batch)
                if strategy.accumulation > 1:
                    loss = loss / strategy.accumulation
                loss.backward()
            optimizer.step()

    return allocation_peak_bytes(run)


def predicted_bytes(model: Any, strategy: Strategy) -> float:
    book = ledger_of(model.work, strategy, CPU)
    return float(book.moments[book.peak].sum())


@pytest.mark.parametrize("name", STEPS)
def test_peaks_are_those_of_the_allocator(name: str) -> None:
    preset, options, text = STEPS[name]
    model, strategy = image_model(preset, **options), Strategy.parse(text)
    tolerance = 0.01 if strategy.precision == "bf16-amp" else 0.001
    assert predicted_bytes(model, strategy) == pytest.approx(measured_bytes(model, strategy), rel=tolerance)


class Recomputed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False, preserve_rng_state=False)


def recompute_blocks(module: nn.Module) -> None:
    """Wraps every block of every stage."""
    for blocks in module.stages:
        for place in range(len(blocks)):
            blocks[place] = Recomputed(blocks[place])


@pytest.mark.parametrize("depth", [18, 50])
def test_recomputed_blocks_keep_a_copy_of_what_their_own_backward_pass_reads(depth: int) -> None:
    strategy = Strategy.parse("micro_batch=16,optimizer=sgd,checkpoint=full")
    model = image_model("resnet", depth=depth, image_size=96, recomputable=True)
    assert predicted_bytes(model, strategy) == pytest.approx(measured_bytes(model, strategy, recompute_blocks), rel=0.001)


def test_batch_norms_are_not_run_twice_unless_said() -> None:
    fixed, free = (image_model("resnet", depth=50, recomputable=r) for r in (False, True))
    none, full = (Strategy.parse(f"micro_batch=16,optimizer=sgd,checkpoint={c}") for c in ("none", "full"))
    assert predicted_bytes(fixed, full) == predicted_bytes(fixed, none)
    assert predicted_bytes(free, full) < predicted_bytes(free, none)
