"""Training with a batch that follows the gradient noise scale: a component for an ordinary PyTorch loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from simtrain.core.errors import InputError
from simtrain.run.batch_policy import BatchChoice, BatchPolicy, MeasuredPrice, Price
from simtrain.run.learning_rate import LearningRate
from simtrain.run.noise_scale import NoiseAverage, NoiseScale, noise_sample
from simtrain.torch.gradient_norms import GradientNorms, adam_weights
from simtrain.torch.step_clock import StepClock

INITIAL = "initial_lr"
"""Where PyTorch's own schedulers, too, keep a group's rate before any schedule."""


class DynamicBatch:
    """Accumulates micro-batches, measures the noise scale, and chooses batch and learning rate from it.

    ```python
    dynamic = st.torch.DynamicBatch(model, optimizer, micro_batch=16)
    loader = DataLoader(data, batch_sampler=dynamic.batch_sampler(RandomSampler(data)))
    for inputs, targets in loader:
        with dynamic.micro_batch(len(inputs)):
            dynamic.backward(loss_function(model(inputs), targets))
        dynamic.step()                                     # does something after the last micro-batch of a step only
    ```

    Every `every` steps the norms of the micro-batches' gradients and of their mean are taken, with no copy of any gradient. Under
    DistributedDataParallel the local gradients are compared with the averaged ones, and all ranks decide alike. On one rank a measured
    step accumulates two micro-batches at least. With Adam and its kin, gradients are divided by sqrt(v) first. The estimate takes
    micro-batches as independent draws; batch norm, which makes gradients depend on the micro-batch, and reentrant checkpointing of a
    shared parameter bend it.

    Args:
        model: What is trained, wrapped in DistributedDataParallel or not. The loss is a mean over samples.
        optimizer: Whose learning rates are those of the base batch; groups keep their ratios.
        micro_batch: Samples per rank and backward pass, at the beginning.
        accumulation: Micro-batches per step, at the beginning.
        policy: What may be chosen; by default this micro-batch, accumulated up to 64 times.
        learning_rate: Schedule; by default constant, following the batch from the first one by AdaScale, or by the square root if
            gradients are preconditioned.
        price: Seconds of a step by micro-batch and accumulation, as predicted; by default as measured, where micro-batches that never ran
            are never chosen. Under DDP at accumulation 1, communication counts as part of the micro-batch.
        scaler: Of gradients, for fp16.
        every: Steps from one measurement to the next.
        max_norm: Gradients are clipped to this norm before the optimizer runs.
        preconditioned: Whether gradients are divided by sqrt(v); by default if the optimizer is of Adam's kind.
        decay: Of the averages, per measured step.

    Raises:
        InputError: The policy cannot hold the first batch.
        UnsupportedError: Sharded parameters or sparse gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batch: int,
        *,
        accumulation: int = 1,
        policy: BatchPolicy | None = None,
        learning_rate: LearningRate | None = None,
        price: Price | None = None,
        scaler: torch.amp.GradScaler | None = None,
        every: int = 20,
        max_norm: float | None = None,
        preconditioned: bool | None = None,
        decay: float = 0.98,
    ) -> None:
        if every < 1:
            raise InputError(f"every is a number of steps from 1 up, not {every!r}")
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._every, self._max_norm = every, max_norm
        self._group = getattr(model, "process_group", None) if hasattr(model, "no_sync") else None
        replicas = dist.get_world_size(self._group) if self._group is not None else 1
        self.policy = policy or BatchPolicy((micro_batch,))
        self.choice = BatchChoice(micro_batch, accumulation, replicas)
        if self.choice not in self.policy.choices(replicas):
            raise InputError(f"{self.choice} is not among what the policy may choose: {_allowed(self.policy)}")
        self.average = NoiseAverage(decay)
        self.steps, self.progress_steps = 0, 0.0
        self._given_price, self._measured = price, MeasuredPrice()
        self._since_change = 0
        wants_weights = any("betas" in g for g in optimizer.param_groups) if preconditioned is None else preconditioned
        self._adam = wants_weights
        self.learning_rate = learning_rate or LearningRate(self.choice.batch, scaling="square-root" if wants_weights else "adascale")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norms = GradientNorms(parameters, adam_weights(optimizer) if wants_weights else None)
        self._clock = StepClock(parameters[0].device)
        for group in optimizer.param_groups:
            group.setdefault(INITIAL, group["lr"])
        self._begin()

    @property
    def noise(self) -> NoiseScale | None:
        """The noise scale in samples, with its standard error; `None` as long as it cannot be told."""
        return self.average.noise_scale()

    @property
    def accumulation(self) -> int:
        """Micro-batches of the step that is running."""
        return self._planned

    def batch_sampler(self, sampler: Iterable[int]) -> Iterable[list[int]]:
        """Returns what a DataLoader takes as `batch_sampler`: micro-batches of the size in force, the last incomplete one dropped."""
        return _MicroBatches(self, sampler)

    @contextmanager
    def micro_batch(self, samples: int | None = None) -> Iterator[None]:
        """Surrounds forward and backward of a micro-batch; ranks average gradients in the last one of a step only.

        Args:
            samples: In this micro-batch, if a loader still delivers an earlier size; the size in force by default.

        Raises:
            InputError: The step is complete, and `step` was not called.
        """
        if self._sizes and len(self._sizes) == self._planned:
            raise InputError("the step has all its micro-batches: call step() after each micro-batch")
        if not self._sizes:
            self._clock.begin()
            if self._sampled:
                self._norms.start()
        self._sizes.append(self.choice.micro_batch if samples is None else samples)
        with self._quiet(len(self._sizes) < self._planned):
            yield
        self._clock.passed()

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass of a micro-batch's mean loss, weighted by its part of the step."""
        if not self._sizes:
            raise InputError("call backward() inside `with dynamic.micro_batch(...)`")
        weighted = loss * (self._sizes[-1] / (self._planned * self.choice.micro_batch))
        (self._scaler.scale(weighted) if self._scaler else weighted).backward()  # type: ignore[no-untyped-call]

    def step(self) -> bool:
        """Runs the optimizer if the step has all its micro-batches.

        Returns:
            Whether a step ended (under a scaler also one whose update was skipped).
        """
        if len(self._sizes) < self._planned:
            return False
        batch = sum(self._sizes) * self.choice.replicas
        scale = float(self._scaler.get_scale()) if self._scaler else 1.0
        self._prepare_gradients(batch)
        if self._sampled:
            self._norms.stop()
            whole_sqr = self._norms.of_gradients()
        noise = self.noise.samples if self.noise else None
        for group in self._optimizer.param_groups:
            group["lr"] = group[INITIAL] * self.learning_rate.factor(self.progress_steps, batch, noise)
        skipped = self._update(scale)
        self._clock.end()
        if self._sampled:
            self._take_in(whole_sqr, scale)
        self.steps += 1
        self._since_change += 1
        if not skipped:
            self.progress_steps += self.learning_rate.advance(batch, noise)
        if self._sampled:
            self._decide()
        self._begin()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns plain data for a snapshot, between two steps.

        Raises:
            InputError: In the middle of a step, whose gradients are no part of it.
        """
        if self._sizes:
            raise InputError("a snapshot between two micro-batches of a step would lose gradients: take it after step() returned True")
        return {
            "micro_batch": self.choice.micro_batch,
            "accumulation": self.choice.accumulation,
            "steps": self.steps,
            "progress_steps": self.progress_steps,
            "since_change": self._since_change,
            "average": self.average.state_dict(),
            "measured_price": self._measured.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, on as many ranks as there are now."""
        self.choice = BatchChoice(state["micro_batch"], state["accumulation"], self.choice.replicas)
        self.steps, self.progress_steps, self._since_change = state["steps"], state["progress_steps"], state["since_change"]
        self.average.load_state_dict(state["average"])
        self._measured.load_state_dict(state["measured_price"])
        self._begin()

    def _begin(self) -> None:
        """Plans the next step: whether it is measured, and how many micro-batches it has."""
        ready = not self._adam or bool(self._optimizer.state)
        self._sampled = ready and self.steps % self._every == self._every - 1
        self._clock.timed = self.steps >= self._every and self.steps % self._every == self._every // 2  # the first steps are slower
        self._planned = max(self.choice.accumulation, 2 if self._sampled and self.choice.replicas == 1 else 1)
        self._sizes: list[int] = []
        self._norms.stop()

    def _quiet(self, quiet: bool) -> AbstractContextManager[Any]:
        return self._model.no_sync() if quiet and self._group is not None else nullcontext()  # type: ignore[operator]

    def _prepare_gradients(self, batch: int) -> None:
        """Takes the scaler's factor out where gradients are looked at, and rights the weights of micro-batches of another size."""
        if self._scaler and (self._sampled or self._max_norm is not None):
            self._scaler.unscale_(self._optimizer)
        if len(set(self._sizes)) > 1 or self._sizes[0] != self.choice.micro_batch:
            planned = self._planned * self.choice.micro_batch * self.choice.replicas
            torch._foreach_mul_([p.grad for p in self._norms.parameters if p.grad is not None], planned / batch)

    def _update(self, scale: float) -> bool:
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self._norms.parameters, self._max_norm)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return self._scaler is not None and float(self._scaler.get_scale()) < scale

    def _take_in(self, whole_sqr: Tensor, scale: float) -> None:
        """Averages over ranks what each has measured, so that all see the same; reads it, which waits for the device."""
        uneven = float(self._sizes != [self.choice.micro_batch] * self._planned)
        part_sqr = self._norms.total().double() * (self._planned / scale**2)  # mean over micro-batches, each weighted by 1 / planned
        pass_s, update_s = self._clock.read() or (0.0, 0.0)
        told = torch.tensor([0.0, uneven, pass_s, update_s], dtype=torch.float64, device=part_sqr.device)
        told[0] = part_sqr
        if self._group is not None:
            dist.all_reduce(told, group=self._group)
            told /= self.choice.replicas
        part, uneven, pass_s, update_s = told.tolist()
        if pass_s > 0:
            self._measured.add(self.choice.micro_batch, pass_s, update_s)
        if not uneven:
            parts = self._planned * self.choice.replicas
            self.average.add(noise_sample(part, float(whole_sqr), parts, self.choice.micro_batch))

    def _decide(self) -> None:
        chosen = self.policy.next(self.choice, self.noise, self._given_price or self._measured, self._since_change)
        if chosen != self.choice:
            self.choice, self._since_change = chosen, 0


class _MicroBatches:
    """Groups a sampler's indices by the micro-batch in force when each is begun."""

    def __init__(self, owner: DynamicBatch, sampler: Iterable[int]) -> None:
        self._owner, self._sampler = owner, sampler

    def __iter__(self) -> Iterator[list[int]]:
        indices: list[int] = []
        for index in self._sampler:
            indices.append(index)
            if len(indices) >= self._owner.choice.micro_batch:
                yield indices
                indices = []


def _allowed(policy: BatchPolicy) -> str:
    limit = f", at most {policy.max_batch} samples a step" if policy.max_batch else ""
    return f"micro-batches {', '.join(map(str, policy.micro_batches))}, up to {policy.max_accumulation} accumulated{limit}"
