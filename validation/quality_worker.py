"""The process that trains for `validation.quality`: a task, a seed and components as JSON in, one JSON line per training out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the usual name)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simtrain.core.strategy import Strategy
from simtrain.run.batch_policy import BatchPolicy, StepPrice
from simtrain.run.learning_rate import LearningRate, Scaling
from simtrain.torch.dynamic_batch import DynamicBatch
from validation.training import apply_checkpointing
from workloads.transformer.module import Transformer
from workloads.transformer.presets import spec as transformer_spec

SLOW_NETWORK = StepPrice(update_s=4.0, pass_s=0.5, sample_s=0.5 / 16)
"""Price by which the dynamic batch decides, in arbitrary units: once a step costs as much as four micro-batches of 16, as over a slow
network. On this machine alone small batches would always win, and nothing would change."""

FOLDS = {"digits": 3, "text": 10}
"""Parts of each task's data, of which one is held out."""


def fold(data: Tensor, seed: int, folds: int) -> tuple[Tensor, Tensor]:
    """Returns the part that a seed holds out, and the rest in its order."""
    first, last = (len(data) * (seed % folds + end) // folds for end in (0, 1))
    return data[first:last], torch.cat([data[:first], data[last:]])


class Digits:
    """Handwritten digits of 8 by 8 pixels, a small convolutional network, accuracy on a third of the images that it never saw.

    Args:
        seed: Of weights and order; three seeds in a row share a split into thirds, and each holds out another one.
        recompute: Whether its convolutions are computed again in backward.
    """

    micro_batch, rate = 32, 2e-3

    def __init__(self, seed: int, *, recompute: bool) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images, labels = torch.tensor(data.images[:, None] / 16, dtype=torch.float32), torch.tensor(data.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed // FOLDS["digits"]))
        held, rest = fold(order, seed, FOLDS["digits"])
        self.test, self.train = (images[held], labels[held]), (images[rest], labels[rest])
        self.samples = 10 * len(self.train[0])
        torch.manual_seed(seed)
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(256, 10)
        self.model = nn.ModuleList([self.features, self.head])
        self.recompute = recompute
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.left = torch.empty(0, dtype=torch.long)

    def draw(self, samples: int) -> Tensor:
        """Returns indices in a new random order each epoch."""
        while len(self.left) < samples:
            self.left = torch.cat([self.left, torch.randperm(len(self.train[0]), generator=self.generator)])
        drawn, self.left = self.left[:samples], self.left[samples:]
        return drawn

    def loss(self, indices: Tensor) -> Tensor:
        """Returns the cross entropy."""
        images = self.train[0][indices]
        seen = checkpoint(self.features, images, use_reentrant=False) if self.recompute else self.features(images)
        return F.cross_entropy(self.head(seen), self.train[1][indices])

    @torch.no_grad()
    def quality(self) -> float:
        """Returns the accuracy."""
        guessed = self.head(self.features(self.test[0])).argmax(1)
        return float((guessed == self.test[1]).double().mean())


class Text:
    """Python's own documentation by characters, a small GPT, loss on a tenth of the text.

    Args:
        seed: Of weights and order; ten seeds in a row hold out each tenth once.
        recompute: Whether its blocks are computed again in backward.
    """

    micro_batch, rate, length = 16, 2e-3, 64

    def __init__(self, seed: int, *, recompute: bool) -> None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        index = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = torch.tensor([index[c] for c in text])
        self.held, self.train = fold(ids, seed, FOLDS["text"])
        self.samples = 220 * self.micro_batch
        torch.manual_seed(seed)
        self.model: nn.Module = Transformer(
            transformer_spec("gpt", layers=2, hidden=96, heads=4, vocabulary=len(index), max_positions=self.length)
        )
        for table in (m for m in self.model.modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(table.weight, std=0.02)
        apply_checkpointing(self.model, Strategy(checkpoint="full" if recompute else "none"))
        self.generator = torch.Generator().manual_seed(seed + 1)

    def draw(self, samples: int) -> Tensor:
        """Returns random places in the text."""
        return torch.randint(len(self.train) - self.length - 1, (samples,), generator=self.generator)

    def loss(self, indices: Tensor) -> Tensor:
        """Returns the loss per character."""
        return self._loss(self.train, indices)

    def _loss(self, ids: Tensor, starts: Tensor) -> Tensor:
        places = starts[:, None] + torch.arange(self.length)
        loss: Tensor = self.model(ids[places], ids[places + 1])
        return loss

    @torch.no_grad()
    def quality(self) -> float:
        """Returns the loss per character over evenly spread places of the held text."""
        starts = torch.linspace(0, len(self.held) - self.length - 2, 512).long()
        return float(torch.stack([self._loss(self.held, part) for part in starts.view(-1, 64)]).mean())


TASKS: dict[str, type[Digits] | type[Text]] = {"digits": Digits, "text": Text}


def train(name: str, seed: int, component: str) -> dict[str, Any]:
    """Trains a task with one component, within the same budget: of samples, or for "dynamic-batch" of priced time."""
    task = TASKS[name](seed, recompute=component in ("checkpoint", "all"))
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=task.rate)
    start = time.process_time()
    dynamic = component.startswith("dynamic-batch") or component == "all"
    runs = _dynamic(task, optimizer, component) if dynamic else _fixed(task, optimizer, component)
    steps = list(runs)
    cpu_s = time.process_time() - start
    return {
        "task": name,
        "seed": seed,
        "component": component,
        "quality": task.quality(),
        "cpu_s": cpu_s,
        "steps": len(steps),
        "last_batch": steps[-1],
    }


def _schedule(task: Digits | Text, scaling: Scaling) -> LearningRate:
    total = task.samples // task.micro_batch
    return LearningRate(task.micro_batch, total, warmup_steps=total // 20, final=0.05, scaling=scaling)


def _autocast(wanted: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if wanted else nullcontext()


def _fixed(task: Digits | Text, optimizer: torch.optim.Optimizer, component: str) -> Iterator[int]:
    total = task.samples // task.micro_batch
    schedule = _schedule(task, "none")
    for step in range(total):
        with _autocast(component == "bf16-amp"):
            loss = task.loss(task.draw(task.micro_batch))
        loss.backward()  # type: ignore[no-untyped-call]
        if component == "schedule":
            for group in optimizer.param_groups:
                group["lr"] = task.rate * schedule.shape(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield task.micro_batch


def _dynamic(task: Digits | Text, optimizer: torch.optim.Optimizer, component: str) -> Iterator[int]:
    """A batch that follows the noise scale; "all" adds everything else, at the baseline's samples, where its schedule ends."""
    together, by_samples = component == "all", component != "dynamic-batch"
    policy = BatchPolicy((task.micro_batch // 2,), max_accumulation=16, dwell_steps=20)
    rate = _schedule(task, "square-root") if together else LearningRate(task.micro_batch, scaling="square-root")
    dynamic = DynamicBatch(
        task.model, optimizer, task.micro_batch // 2, accumulation=2, policy=policy, learning_rate=rate, price=SLOW_NETWORK, every=5
    )
    step_price = SLOW_NETWORK(task.micro_batch // 2, 2)
    left = float(task.samples) if by_samples else task.samples // task.micro_batch * step_price
    while left > 0:
        size = dynamic.choice.micro_batch
        with dynamic.micro_batch(size):
            with _autocast(together):
                loss = task.loss(task.draw(size))
            dynamic.backward(loss)
        accumulation = dynamic.accumulation
        if dynamic.step():
            left -= accumulation * size if by_samples else SLOW_NETWORK(size, accumulation)
            yield accumulation * size


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    for component in request["components"]:
        print(json.dumps(train(request["task"], request["seed"], component)), flush=True)


if __name__ == "__main__":
    main()
