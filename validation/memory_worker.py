"""The process that trains one model under several ways to recompute: reads a request as JSON, writes one JSON line per way.

Run as `python -P -m validation.memory_worker` by `validation.memory`, which fixes core, threads and allocator.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from simtrain.torch.applied import apply
from validation.allocation_peak import allocation_peak_bytes
from validation.steps import TrainingStep
from validation.training import build, build_optimizer

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
    """

    def __init__(self, step: TrainingStep, way: str) -> None:
        torch.manual_seed(0)
        self.model, self.batch = build(step)
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

    def step(self) -> None:
        """Runs one training step."""
        self.passes()
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the model as it is."""
        self.passes()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def peak_bytes(self) -> int:
        """Allocation peak of a step, with all that is held beneath it (parameters, buffers, states, the batch)."""
        self.optimizer.zero_grad(set_to_none=True)
        held: list[Tensor] = [*self.model.parameters(), *self.model.buffers(), *self.batch]
        held += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return allocation_peak_bytes(self.step) + sum(t.nbytes for t in held)


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    if request["core"] is not None:
        os.sched_setaffinity(0, {request["core"]})
    step = TrainingStep.from_dict(request["step"])
    step = replace(step, strategy=str(step.parsed().with_(checkpoint="none")))
    ways: list[str] = request["ways"]
    answers: dict[str, dict[str, Any]] = {}
    plain = Trainer(step, "none").gradients()
    ready: dict[str, Trainer] = {}
    for way in ways:
        try:
            trainer = Trainer(step, way)
            answers[way], ready[way] = {}, trainer
            if not way.startswith(TENSORIZE):  # which is another model
                own = trainer.gradients()
                most = max(float((own[n] - plain[n]).abs().max() / plain[n].abs().max().clamp_min(1e-30)) for n in plain)
                answers[way] = {"gradient_difference": most}
        except Exception as error:
            answers[way] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    if request["rounds"]:
        _time(ready, request["rounds"], answers)
    else:
        for trainer in ready.values():
            trainer.step()  # after which nothing is left to be made once
    for way, trainer in ready.items():  # after timing, when nothing is left to be made once
        answers[way]["peak_bytes"] = trainer.peak_bytes()
    for way in ways:
        print(json.dumps({"way": way} | answers[way]), flush=True)


def _time(ready: dict[str, Trainer], rounds: int, answers: dict[str, dict[str, Any]]) -> None:
    """Times all ways in turn, so that a machine that drifts does so for all."""
    times: dict[str, list[float]] = {way: [] for way in ready}
    for number in range(WARMUP + rounds):
        for way, trainer in ready.items():
            start = time.process_time()
            trainer.step()
            if number >= WARMUP:
                times[way].append(time.process_time() - start)
            trainer.optimizer.zero_grad(set_to_none=True)
    for way, taken in times.items():
        lower, middle, upper = quantiles(taken, n=4)
        answers[way] |= {"step_time_s": middle, "noise": (upper - lower) / middle}


if __name__ == "__main__":
    main()
