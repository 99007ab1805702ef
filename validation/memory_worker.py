"""The process that trains one model under several ways to recompute: reads a request as JSON, writes one JSON line per way.

Run as `python -P -m validation.memory_worker` by `validation.memory`, which fixes core, threads and allocator.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from simtrain.torch.applied import apply
from validation.backend import Backend, CpuBackend, backend
from validation.steps import TrainingStep
from validation.training import build, build_optimizer, on_device

PARTITIONER = "partitioner:"
"""Before the share of saved bytes that PyTorch's budgeted partitioner may keep."""

TENSORIZE = "tensorize="
"""Before the form of the blocks' weights."""

WARMUP = 2


class Trainer:
    """A model under one way to recompute.

    The partitioner is PyTorch's own (`torch._functorch.config.activation_memory_budget`), running the traced operators one by one.

    Args:
        step: Which model, and its batch.
        way: As a strategy says it, `partitioner:SHARE`, or `tensorize=FORM`.
        device: Where; the processor by default.
    """

    def __init__(self, step: TrainingStep, way: str, device: Backend | None = None) -> None:
        torch.manual_seed(0)
        self.device = device or CpuBackend()
        self.device.autocast(step.parsed().precision)  # sets how products of fp32 tensors run
        self.model, self.batch = on_device(build(step), self.device.torch_device)
        self.optimizer = build_optimizer(self.model, step.parsed().optimizer)
        self.run: Callable[..., Any]
        if way.startswith(PARTITIONER):
            import torch._functorch.config as partitioner

            torch._dynamo.reset()
            with partitioner.patch(activation_memory_budget=float(way.removeprefix(PARTITIONER))):
                self.run = torch.compile(self.model, backend="aot_eager_decomp_partition")
                self.passes()  # traced here, while the budget holds
        else:
            form = way.removeprefix(TENSORIZE)
            strategy = step.parsed().with_(**{"checkpoint": way} if form == way else {"tensorize": form})
            applied = apply(strategy, self.model, self.optimizer, recompute_batch_norms=True)

            def run(*batch: Tensor) -> Tensor:
                with applied.forward():
                    loss: Tensor = applied.model(*batch)
                return loss

            self.run = run

    def passes(self) -> None:
        """Clears gradients, then runs forward and backward."""
        self.optimizer.zero_grad(set_to_none=True)
        self.run(*self.batch).backward()

    def update(self) -> None:
        """Runs the optimizer."""
        self.optimizer.step()

    def step(self) -> None:
        """Runs one training step."""
        self.passes()
        self.update()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the model as it is."""
        self.passes()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def held(self) -> list[Tensor]:
        """Returns what is kept between steps: parameters, buffers, states, the batch. Gradients are let go."""
        self.optimizer.zero_grad(set_to_none=True)
        held: list[Tensor] = [*self.model.parameters(), *self.model.buffers(), *self.batch]
        return held + [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]

    def peak_bytes(self, others: int = 0) -> int:
        """Allocation peak of a step, with all that is held beneath it.

        Args:
            others: Bytes that trainers beside this one hold on the device.
        """
        return self.device.peak_bytes(self.step, sum(t.nbytes for t in self.held()), others)[0]


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    device = backend(request["device"])
    device.prepare(request["core"], threads=1)
    step = TrainingStep.from_dict(request["step"])
    step = replace(step, strategy=str(step.parsed().with_(checkpoint="none")))
    ways: list[str] = request["ways"]
    answers: dict[str, dict[str, Any]] = {}
    plain = Trainer(step, "none", device).gradients()
    ready: dict[str, Trainer] = {}
    for way in ways:
        try:
            trainer = Trainer(step, way, device)
            answers[way], ready[way] = {}, trainer
            if not way.startswith(TENSORIZE):  # which is another model
                own = trainer.gradients()
                most = max(float((own[n] - plain[n]).abs().max() / plain[n].abs().max().clamp_min(1e-30)) for n in plain)
                answers[way] = {"gradient_difference": most}
        except Exception as error:
            answers[way] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    del plain
    if request["rounds"]:
        _time(ready, request["rounds"], answers, device)
    else:
        for trainer in ready.values():
            trainer.step()  # after which nothing is left to be made once
    held = {way: sum(_block_bytes(t) for t in trainer.held() if t.device.type != "cpu") for way, trainer in ready.items()}
    for way, trainer in ready.items():  # after timing, when nothing is left to be made once
        answers[way]["peak_bytes"] = trainer.peak_bytes(others=sum(held.values()) - held[way])
    for way in ways:
        print(json.dumps({"way": way} | answers[way]), flush=True)


def _block_bytes(tensor: Tensor) -> int:
    """Returns what a tensor takes of PyTorch's caching allocator: whole blocks of 512 bytes."""
    return -(-tensor.nbytes // 512) * 512


def _time(ready: dict[str, Trainer], rounds: int, answers: dict[str, dict[str, Any]], device: Backend) -> None:
    """Times all ways in turn, so that a machine that drifts does so for all."""
    times: dict[str, list[float]] = {way: [] for way in ready}
    for number in range(WARMUP + rounds):
        for way, trainer in ready.items():
            taken, _ = device.timed_steps_s(trainer, 1, lambda _: None)
            if number >= WARMUP:
                times[way] += taken
            trainer.optimizer.zero_grad(set_to_none=True)
    for way, taken in times.items():
        lower, middle, upper = quantiles(taken, n=4)
        answers[way] |= {"step_time_s": middle, "noise": (upper - lower) / middle}


if __name__ == "__main__":
    main()
