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
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from simtrain.torch.apply import apply
from validation.allocation_peak import allocation_peak_bytes
from validation.steps import TrainingStep
from validation.training import build, build_optimizer

PARTITIONER = "partitioner:"
"""Before the share of saved bytes that PyTorch's budgeted partitioner may keep."""

WARMUP = 2


def trainer(step: TrainingStep, checkpoint: str) -> tuple[nn.Module, Callable[[], None], Callable[[], None]]:
    """Returns a model, what runs forward and backward, and what runs the update, under one way to recompute.

    The partitioner is PyTorch's own (`torch._functorch.config.activation_memory_budget`), running the traced operators one by one.
    """
    torch.manual_seed(0)
    model, batch = build(step)
    optimizer = build_optimizer(model, step.parsed().optimizer)
    if checkpoint.startswith(PARTITIONER):
        import torch._functorch.config as partitioner

        torch._dynamo.reset()
        with partitioner.patch(activation_memory_budget=float(checkpoint.removeprefix(PARTITIONER))):
            run: Any = torch.compile(model, backend="aot_eager_decomp_partition")
            run(*batch).backward()  # traced here, while the budget holds
        optimizer.zero_grad(set_to_none=True)
        return model, lambda: run(*batch).backward(), optimizer.step
    applied = apply(step.parsed().with_(checkpoint=checkpoint), model, optimizer, recompute_batch_norms=True)

    def passes() -> None:
        with applied.forward():
            loss: Tensor = applied.model(*batch)
        loss.backward()  # type: ignore[no-untyped-call]

    return model, passes, optimizer.step


def gradients(step: TrainingStep, checkpoint: str) -> dict[str, Tensor]:
    """Gradients of the first step."""
    model, passes, _ = trainer(step, checkpoint)
    passes()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def peak_bytes(step: TrainingStep, checkpoint: str) -> int:
    """Allocation peak of the second step, and all that is held beneath it.

    Blocks are tested in the first step, and the partitioner traces there; neither is part of training.
    """
    held: list[Any] = []

    def start() -> None:
        model, passes, update = trainer(step, checkpoint)
        passes()
        update()
        model.zero_grad(set_to_none=True)
        held.append((model, passes, update))

    def second() -> None:
        model, passes, update = held[0]
        passes()
        update()
        model.zero_grad(set_to_none=True)

    start()
    model, _, update = held[0]
    beneath = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    optimizer = update.__self__
    beneath += sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    batch = build(step)[1]
    return allocation_peak_bytes(second) + int(beneath) + sum(t.nbytes for t in batch)


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
    plain = gradients(step, "none")
    for way in ways:
        try:
            own = gradients(step, way)
            most = max(float((own[n] - plain[n]).abs().max() / plain[n].abs().max().clamp_min(1e-30)) for n in plain)
            answers[way] = {"gradient_difference": most, "peak_bytes": peak_bytes(step, way)}
        except Exception as error:
            answers[way] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    _time(step, [w for w in ways if "error" not in answers[w]], request["rounds"], answers)
    for way in ways:
        print(json.dumps({"way": way} | answers[way]), flush=True)


def _time(step: TrainingStep, ways: list[str], rounds: int, answers: dict[str, dict[str, Any]]) -> None:
    """Times all ways in turn, so that a machine that drifts does so for all."""
    ready = {way: trainer(step, way) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(WARMUP + rounds):
        for way, (model, passes, update) in ready.items():
            start = time.process_time()
            model.zero_grad(set_to_none=True)
            passes()
            update()
            if number >= WARMUP:
                times[way].append(time.process_time() - start)
            model.zero_grad(set_to_none=True)
    for way in ways:
        lower, middle, upper = quantiles(times[way], n=4)
        answers[way] |= {"step_time_s": median(times[way]), "noise": (upper - lower) / middle}


if __name__ == "__main__":
    main()
