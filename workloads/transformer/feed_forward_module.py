"""What follows attention in a transformer's block, as PyTorch modules: two or three matrices, or a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the usual name)
from torch import Tensor, nn

from simtrain.core.errors import UnsupportedError
from workloads.transformer.spec import TransformerSpec


def make_feed_forward(spec: TransformerSpec, width: int) -> nn.Module:
    """Returns the spec's kind of ordinary feed-forward part, of some inner width."""
    return GatedFeedForward(spec, width) if spec.activation == "swiglu" else FeedForward(spec, width)


class FeedForward(nn.Module):
    """Two matrices around a GELU or a squared ReLU."""

    def __init__(self, spec: TransformerSpec, width: int) -> None:
        super().__init__()
        self.activation = spec.activation
        self.fc1 = nn.Linear(spec.hidden, width, bias=spec.bias)
        self.fc2 = nn.Linear(width, spec.hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms every position on its own."""
        mixed: Tensor = self.fc2(_activate(self.fc1(x), self.activation))
        return mixed


def _activate(x: Tensor, name: str) -> Tensor:
    """Applies an activation function without a gate."""
    if name == "relu-squared":
        squared: Tensor = SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
        return squared
    return F.gelu(x, approximate="tanh" if name == "gelu-tanh" else "none")


class SquaredReLU(torch.autograd.Function):
    """`max(x, 0)^2`, keeping its input alone for the backward pass, as a fused kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Returns the squares of what is positive."""
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Returns `2 max(x, 0)` times the gradient."""
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(gradient).mul_(2)


class GatedFeedForward(nn.Module):
    """Three matrices, one of them a gate (Shazeer 2020, "GLU variants improve Transformer")."""

    def __init__(self, spec: TransformerSpec, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden, width, bias=spec.bias)
        self.up = nn.Linear(spec.hidden, width, bias=spec.bias)
        self.down = nn.Linear(width, spec.hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms every position on its own."""
        mixed: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return mixed


class GroupedExperts(nn.Module):
    """The matrices of all experts, each multiplied by the rows of its own, all experts in one kernel."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        wide = (spec.experts, spec.hidden, spec.expert_width)
        if spec.activation == "swiglu":
            self.gate, self.up = nn.Parameter(torch.empty(wide)), nn.Parameter(torch.empty(wide))
            self.down = nn.Parameter(torch.empty(spec.experts, spec.expert_width, spec.hidden))
        else:
            self.fc1 = nn.Parameter(torch.empty(wide))
            self.fc2 = nn.Parameter(torch.empty(spec.experts, spec.expert_width, spec.hidden))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Transforms rows sorted by expert; `ends` says where each expert's rows end."""
        if self.activation == "swiglu":
            inner = F.silu(F.grouped_mm(x, low(self.gate), offs=ends)) * F.grouped_mm(x, low(self.up), offs=ends)
            return F.grouped_mm(inner, low(self.down), offs=ends)
        inner = _activate(F.grouped_mm(x, low(self.fc1), offs=ends), self.activation)
        return F.grouped_mm(inner, low(self.fc2), offs=ends)


class MixtureOfExperts(nn.Module):
    """Every token goes to the experts that a router scores highest (Shazeer et al. 2017); none is dropped (Gale et al. 2023)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        if spec.capacity:
            raise UnsupportedError(
                f"the real module drops no choices: capacity={spec.capacity:g} can be predicted, not run; set capacity = 0"
            )
        self.top_k, self.pre_softmax = spec.top_k, spec.pre_softmax
        self.router = nn.Linear(spec.hidden, spec.experts, bias=False)
        self.experts = GroupedExperts(spec)
        self.shared = make_feed_forward(spec, spec.shared_ffn) if spec.shared_ffn else None

    def forward(self, x: Tensor) -> Tensor:
        """Adds up what a token's experts make of it, times their weights."""
        rows = low(x).flatten(0, 1)
        mixed = self.route(rows)
        if self.shared is not None:
            mixed = mixed + self.shared(rows)
        return mixed.view_as(x)

    def route(self, x: Tensor) -> Tensor:
        """Sends tokens to their experts and brings them back."""
        scores = self.router(x).float()
        if self.pre_softmax:
            weights, chosen = F.softmax(scores, dim=-1).topk(self.top_k)
        else:
            weights, chosen = scores.topk(self.top_k)
            weights = F.softmax(weights, dim=-1)
        sorted_choices, order = chosen.flatten().sort()
        ends = torch.searchsorted(sorted_choices, torch.arange(self.router.out_features, device=x.device), right=True, out_int32=True)
        rows = order // self.top_k
        made = self.experts(x.index_select(0, rows), ends)
        made = made * low(weights.flatten().index_select(0, order)).unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, rows, made)


def low(x: Tensor) -> Tensor:
    """Converts to autocast's format, for operators that autocast does not know."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
