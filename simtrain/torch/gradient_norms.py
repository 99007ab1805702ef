"""Squared norms of micro-batch gradients without a copy of them: hooks see each parameter's gradient before it is accumulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from simtrain.core.errors import UnsupportedError

Weights = Callable[[nn.Parameter], Tensor | None]
"""What a parameter's gradient is divided by before its norm is taken; `None` for nothing."""


class GradientNorms:
    """Sums squared gradient norms over the backward passes between `start` and `stop`.

    A tensor's hooks run on the gradient of one backward pass, before it is added to `.grad` and before data parallelism averages it. So
    nothing is copied: what it costs is one pass over each gradient while it is in cache.

    Args:
        parameters: Whose gradients count.
        weights: See `Weights`.

    Raises:
        UnsupportedError: A parameter is sharded over ranks (DTensor): its gradients are averaged before anyone sees them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weights: Weights | None = None) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._weights = weights
        self._handles: list[Any] = []
        self._parts: list[Tensor] = []
        if any(hasattr(p, "device_mesh") for p in self.parameters):
            raise UnsupportedError("gradients of sharded parameters are averaged before they can be measured: use DDP or one rank")

    def start(self) -> None:
        """Begins to listen."""
        self.stop()
        self._parts = []
        self._handles = [p.register_hook(self._hook(p)) for p in self.parameters]  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Stops listening; the sum stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def total(self) -> Tensor:
        """Returns the sum over all backward passes and parameters since `start`, on the device."""
        return _sum(self._parts, self.parameters)

    def of_gradients(self) -> Tensor:
        """Returns the squared norm of what now lies in `.grad`."""
        return _sum([self._square(p, p.grad) for p in self.parameters if p.grad is not None], self.parameters)

    def _hook(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def listen(gradient: Tensor) -> None:
            self._parts.append(self._square(parameter, gradient))

        return listen

    def _square(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        if gradient.is_sparse:
            raise UnsupportedError("norms of sparse gradients are not measured: use dense ones (Embedding(sparse=False))")
        weight = self._weights(parameter) if self._weights else None
        values = gradient.detach() if weight is None else gradient.detach() / weight
        if values.dtype == torch.float32 and values.is_contiguous():
            flat = values.view(-1)
            return torch.dot(flat, flat)
        norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
        return norm.square()


def adam_weights(optimizer: torch.optim.Optimizer) -> Weights:
    """Returns what Adam divides gradients by: sqrt(v) + eps, v corrected for its beginning.

    Args:
        optimizer: Adam or one of its kin, with `exp_avg_sq` in its state and `betas` and `eps` in its groups.
    """
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}

    def weights(parameter: nn.Parameter) -> Tensor | None:
        state, group = optimizer.state.get(parameter), group_of.get(parameter)
        if not state or group is None:
            return None
        seen: Tensor = state["exp_avg_sq"]
        correction = (1 - group["betas"][1] ** float(state["step"])) ** 0.5
        return seen.sqrt().div_(correction).add_(group["eps"])

    return weights


def _sum(parts: list[Tensor], parameters: list[nn.Parameter]) -> Tensor:
    if not parts:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    return torch.stack([p.to(parts[0].device) for p in parts]).sum()
