"""The process that trains a job of the proposal for real: a request as JSON in its first argument, one JSON line out, from rank 0.

Started alone or by `torch.distributed.run`, one process for each card (or, without cards, on the processor).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from simtrain.run.batch_policy import BatchPolicy
from simtrain.run.learning_rate import LearningRate
from simtrain.torch.dynamic_batch import DynamicBatch
from validation.proposal_data import Images, Words, read_cifar10, read_wikitext2
from validation.training import Segment
from workloads.convnet.module import ResNet
from workloads.convnet.presets import spec as convnet_spec
from workloads.transformer.module import Transformer
from workloads.transformer.presets import spec as transformer_spec

EVALUATIONS = 20
SEEN_AT_ONCE = 64


class ImageTask:
    """ResNet on CIFAR-10; quality is the accuracy on the test images."""

    rate = 0.05

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.data: Images = read_cifar10(folder)
        self.model: nn.Module = ResNet(convnet_spec("resnet50-cifar", **options))
        self.size = len(self.data.train[0])

    def recompute(self) -> None:
        """Makes every block run again in backward."""
        self.model.stages = nn.ModuleList(nn.ModuleList(Segment([b]) for b in blocks) for blocks in self.model.stages)  # type: ignore[union-attr]

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns the usual optimizer of such networks."""
        return torch.optim.SGD(self.model.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)

    def batch(self, generator: torch.Generator, samples: int) -> tuple[Tensor, Tensor]:
        """Returns random images, half of them mirrored, and their classes."""
        at = torch.randint(self.size, (samples,), generator=generator).numpy()
        images = torch.from_numpy(self.data.train[0][at])
        mirrored = torch.rand(samples, generator=generator) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
        return images, torch.from_numpy(self.data.train[1][at])

    @torch.no_grad()
    def quality(self, model: nn.Module, device: torch.device) -> float:
        """Returns the accuracy."""
        model.eval()
        right = 0
        for first in range(0, len(self.data.test[0]), SEEN_AT_ONCE):
            x = model.stem(torch.from_numpy(self.data.test[0][first : first + SEEN_AT_ONCE]).to(device))  # type: ignore[operator]
            for blocks in model.stages:  # type: ignore[union-attr]
                for block in blocks:  # type: ignore[union-attr]
                    x = block(x)
            guessed = model.head.fc(model.head.pool(x).flatten(1)).argmax(1).cpu()  # type: ignore[operator,union-attr]
            right += int((guessed == torch.from_numpy(self.data.test[1][first : first + SEEN_AT_ONCE])).sum())
        model.train()
        return right / len(self.data.test[0])


class TextTask:
    """GPT-2 on WikiText-2 by words; quality is the loss per word of the validation text (less is better)."""

    rate = 3e-4

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.data: Words = read_wikitext2(folder)
        self.spec = transformer_spec("gpt2-small", **{"vocabulary": self.data.vocabulary} | options)
        self.model: nn.Module = Transformer(self.spec)
        self.length = min(self.spec.max_positions, len(self.data.train) - 1, len(self.data.valid) - 1)
        self.size = len(self.data.train) // self.length

    def recompute(self) -> None:
        """Makes every block run again in backward."""
        self.model.blocks = nn.ModuleList(Segment([b]) for b in self.model.blocks)  # type: ignore[union-attr,arg-type]

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns the usual optimizer of such models."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.rate)

    def batch(self, generator: torch.Generator, samples: int) -> tuple[Tensor, Tensor]:
        """Returns random stretches of the text, and what follows each word."""
        starts = torch.randint(len(self.data.train) - self.length, (samples,), generator=generator)
        return self._at(self.data.train, starts)

    @torch.no_grad()
    def quality(self, model: nn.Module, device: torch.device) -> float:
        """Returns the loss per word over whole stretches of the validation text."""
        model.eval()
        starts = torch.arange(0, len(self.data.valid) - self.length, self.length)[: 4 * SEEN_AT_ONCE]
        losses = [float(model(*(t.to(device) for t in self._at(self.data.valid, part)))) for part in starts.split(1)]
        model.train()
        return sum(losses) / len(losses)

    def _at(self, ids: Any, starts: Tensor) -> tuple[Tensor, Tensor]:
        places = starts[:, None] + torch.arange(self.length)
        words = torch.from_numpy(ids)
        return words[places], words[places + 1]


TASKS: dict[str, type[ImageTask] | type[TextTask]] = {"resnet50-cifar10": ImageTask, "gpt2-wikitext2": TextTask}


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Trains one variant with one seed over the requested samples, on this rank's device.

    Args:
        request: job, folder, seed, components, micro_batch, micro_batches, max_batch, samples, options.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    components, seed = request["components"], request["seed"]
    torch.manual_seed(seed)
    task = TASKS[request["job"]](Path(request["folder"]), request["options"])
    if "checkpointing" in components:
        task.recompute()
    task.model.to(device)
    optimizer = task.optimizer()
    wrapped = DistributedDataParallel(task.model, [device] if gpu else None) if ranks > 1 else task.model
    dynamic = _loop(wrapped, optimizer, request, ranks, fp16="precision" in components and gpu)
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    curve = list(_steps(task, wrapped, dynamic, request, ranks, device, generator))
    if dist.is_initialized():
        dist.barrier()
    return {
        "job": request["job"],
        "seed": seed,
        "components": components,
        "ranks": ranks,
        "quality": curve[-1][2],
        "time_s": curve[-1][0],
        "samples": curve[-1][1],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
        "last_batch": dynamic.choice.batch,
        "curve": curve,
    }


def _loop(model: nn.Module, optimizer: torch.optim.Optimizer, request: dict[str, Any], ranks: int, *, fp16: bool) -> DynamicBatch:
    """Every variant runs in the same loop; a fixed batch is one that may not be changed, and is never measured."""
    micro, following = request["micro_batch"], "dynamic batch" in request["components"]
    base = micro * ranks
    sizes = tuple(request["micro_batches"]) if following else (micro,)
    policy = BatchPolicy(sizes, max_accumulation=max(1, request["max_batch"] // base) if following else 1)
    total = max(2.0, request["samples"] / base)
    text = request["job"] == "gpt2-wikitext2"
    if "learning rate" in request["components"]:
        rate = LearningRate(base, total, warmup_steps=total // 20, final=0.05, scaling="square-root" if text else "linear")
    else:
        rate = LearningRate(base, scaling="none")
    scaler = torch.amp.GradScaler("cuda") if fp16 else None
    return DynamicBatch(model, optimizer, micro, policy=policy, learning_rate=rate, scaler=scaler, every=20 if following else sys.maxsize)


def _steps(
    task: ImageTask | TextTask,
    model: nn.Module,
    dynamic: DynamicBatch,
    request: dict[str, Any],
    ranks: int,
    device: torch.device,
    generator: torch.Generator,
) -> Iterator[tuple[float, int, float]]:
    """Trains, and yields seconds of training, samples and quality at even distances."""
    samples, spent_s, told = 0, 0.0, 0
    while samples < request["samples"]:
        begun = time.perf_counter()
        size = dynamic.choice.micro_batch
        batch = tuple(t.to(device, non_blocking=True) for t in task.batch(generator, size))
        with dynamic.micro_batch(size):
            with _autocast(request["components"], device):
                loss = model(*batch)
            dynamic.backward(loss)
        complete = dynamic.step()
        samples += size * ranks
        due = samples * EVALUATIONS // request["samples"]
        if (complete and due > told) or samples >= request["samples"]:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent_s, told = spent_s + time.perf_counter() - begun, due
            yield spent_s, samples, task.quality(task.model, device)
        else:
            spent_s += time.perf_counter() - begun


def _autocast(components: list[str], device: torch.device) -> AbstractContextManager[Any]:
    if "precision" not in components:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16)


def main() -> None:
    """Answers one request."""
    done = train(json.loads(sys.argv[1]))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
