"""What recomputation is planned for: a chain of layers known by arrays, and segments of it that are kept or recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simtrain.core.polynomial import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Layers in forward order, each known by its times and by what it holds.

    Attributes:
        forward_s: Forward time of each layer; the time to recompute it inside a segment.
        last_s: Time to recompute it as the last of its segment (recomputation may stop early).
        input_bytes: Its input.
        output_gradient_bytes: The gradient of its output, which is there when its backward pass begins (0 for a layer that ends in the
            loss).
        saved_bytes: What it saves for backward, without its input.
        keeps_input: Whether its backward pass reads its input.
        forward_peak_bytes: The most that its forward pass holds beyond its input, if it saves.
        dropping_peak_bytes: The same if it saves nothing.
        backward_peak_bytes: The most that its backward pass holds beyond what is there when it begins (input, what is saved, and the
            gradient of its output).
        left_bytes: What its backward pass leaves behind (gradients of parameters).
        recomputable: Whether it may run forward twice.
        until_loss_bytes: What it holds from its forward pass until all layers have run forward, if it is kept (casts of weights that
            autocast caches), beyond what it saves.
        dropping_until_loss_bytes: The same if it is recomputed.
    """

    forward_s: FloatArray
    last_s: FloatArray
    input_bytes: FloatArray
    output_gradient_bytes: FloatArray
    saved_bytes: FloatArray
    keeps_input: NDArray[np.bool_]
    forward_peak_bytes: FloatArray
    dropping_peak_bytes: FloatArray
    backward_peak_bytes: FloatArray
    left_bytes: FloatArray
    recomputable: NDArray[np.bool_]
    until_loss_bytes: FloatArray
    dropping_until_loss_bytes: FloatArray

    def __len__(self) -> int:
        return len(self.forward_s)

    @property
    def kept_bytes(self) -> FloatArray:
        """What each layer holds from its forward to its backward pass if it is kept."""
        return self.saved_bytes + np.where(self.keeps_input, self.input_bytes, 0.0)

    @property
    def left_behind_bytes(self) -> FloatArray:
        """What the backward passes from each layer to the end have left, and 0 behind the last."""
        return np.append(np.cumsum(self.left_bytes[::-1])[::-1], 0.0)


class Span(NamedTuple):
    """Layers from `start` up to but not including `stop`, recomputed together or kept."""

    start: int
    stop: int
    recomputed: bool


@dataclass(frozen=True, slots=True)
class RematPlan:
    """What is recomputed.

    Attributes:
        spans: Segments in forward order.
        added_s: Time of the recomputation.
        peak_bytes: Most that is held at once.
        bound_s: No plan of segments within the budget adds less; equal to `added_s` where the plan is proven optimal.
    """

    spans: tuple[Span, ...]
    added_s: float
    peak_bytes: float
    bound_s: float


def peak_bytes(chain: Chain, spans: Sequence[Span]) -> float:
    """Replays forward and backward with a plan, allocating and releasing, and returns the most that is held."""
    x, saved, kept, gradient = (a.tolist() for a in (chain.input_bytes, chain.saved_bytes, chain.kept_bytes, chain.output_gradient_bytes))
    held, peak, until_loss = 0.0, 0.0, 0.0
    for start, stop, recomputed in spans:
        for i in range(start, stop):
            running = chain.dropping_peak_bytes[i] + (x[start] if i > start else 0.0) if recomputed else chain.forward_peak_bytes[i]
            peak = max(peak, held + until_loss + x[i] + running)
            held += 0.0 if recomputed else kept[i]
            until_loss += (chain.dropping_until_loss_bytes if recomputed else chain.until_loss_bytes)[i]
        held += x[start] if recomputed else 0.0
    for start, stop, recomputed in reversed(spans):
        if recomputed:
            for i in range(start, stop):
                peak = max(peak, held + gradient[stop - 1] + (x[i] if i > start else 0.0) + chain.forward_peak_bytes[i])
                held += kept[i] if i > start else saved[i]
        for i in reversed(range(start, stop)):
            peak = max(peak, held + gradient[i] + chain.backward_peak_bytes[i])
            held += chain.left_bytes[i] - (saved[i] if recomputed and i == start else kept[i])
        held -= x[start] if recomputed else 0.0
    return float(peak)
