"""Time inside each PyTorch operator of a real training step, where it runs: warm or cold caches as they are.

Timing operators on their own is 5 to 26 % too fast on a CPU, because their operands are still in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simtrain.core.workload import OperatorKind

_KINDS: dict[OperatorKind, tuple[str, ...]] = {
    OperatorKind.GEMM: ("mm", "addmm"),
    OperatorKind.BATCHED_GEMM: ("bmm", "baddbmm"),
    OperatorKind.ATTENTION: ("_scaled_dot_product_flash_attention_for_cpu",),
    OperatorKind.ATTENTION_BACKWARD: ("_scaled_dot_product_flash_attention_for_cpu_backward",),
    OperatorKind.NORM: ("native_layer_norm", "_fused_rms_norm"),
    OperatorKind.NORM_BACKWARD: ("native_layer_norm_backward", "_fused_rms_norm_backward"),
    OperatorKind.SOFTMAX: ("_log_softmax", "_softmax", "nll_loss_forward"),
    OperatorKind.SOFTMAX_BACKWARD: ("_log_softmax_backward_data", "_softmax_backward_data", "nll_loss_backward"),
    OperatorKind.CONVOLUTION: ("convolution",),
    OperatorKind.CONVOLUTION_BACKWARD: ("convolution_backward",),
    OperatorKind.BATCH_NORM: ("native_batch_norm",),
    OperatorKind.BATCH_NORM_BACKWARD: ("native_batch_norm_backward",),
    OperatorKind.POOLING: ("max_pool2d_with_indices",),
    OperatorKind.POOLING_BACKWARD: ("max_pool2d_with_indices_backward",),
    OperatorKind.REDUCTION: ("sum", "mean"),
    OperatorKind.EMBEDDING: ("embedding",),
    OperatorKind.EMBEDDING_BACKWARD: ("embedding_dense_backward",),
    OperatorKind.COPY: ("clone", "copy_", "stack", "cat", "slice_backward", "select_backward"),
    OperatorKind.CAST: ("_to_copy",),
    OperatorKind.ELEMENTWISE: (
        *("add", "add_", "sub", "mul", "mul_", "div", "div_", "neg", "pow", "rsqrt", "gelu", "gelu_backward", "silu", "silu_backward"),
        *(
            "sigmoid",
            "tanh",
            "where",
            "masked_fill",
            "native_dropout",
            "native_dropout_backward",
            "bernoulli_",
            "relu",
            "relu_",
            "threshold_backward",
        ),
    ),
}
KIND_OF_ATEN: dict[str, OperatorKind] = {name: kind for kind, names in _KINDS.items() for name in names}
"""The kind of each ATen operator that does arithmetic or moves memory; views and bookkeeping are left to the framework's share."""


class OperatorClock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records process CPU time spent inside each operator while it is active.

    Attributes:
        calls: ATen name and time of each call, in order, the clock's own cost not taken off.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator between two readings of the clock."""
        kwargs = kwargs or {}
        start = time.process_time_ns()
        out = func(*args, **kwargs)
        elapsed = time.process_time_ns() - start
        name = func._schema.name.removeprefix("aten::")
        self.calls.append((_marked(name, kwargs, out), elapsed))
        return out


def _marked(name: str, kwargs: Mapping[str, Any], out: Any) -> str:
    """Adds to an operator's name what it does that takes longer."""
    if kwargs.get("approximate") == "tanh":
        return f"{name}_tanh"
    return f"{name}_complex" if isinstance(out, torch.Tensor) and out.is_complex() else name


def _clock_cost_ns(samples: int = 2000) -> float:
    """Returns what reading the clock twice in a row shows."""
    readings = [time.process_time_ns() for _ in range(samples)]
    return median(b - a for a, b in pairwise(readings))


class ClassTimes:
    """Adds up what several training steps spend in each class of operators.

    Args:
        kernel_class: Maps a kind and an operator's name to its class.

    Attributes:
        rows: For each step, seconds of every call by class, in program order; the optimizer is one call.
    """

    def __init__(self, kernel_class: Callable[[OperatorKind, str], str]) -> None:
        self.kernel_class = kernel_class
        self.rows: list[dict[str, list[float]]] = []
        self._cost_ns = _clock_cost_ns()

    def step(self, passes: Callable[[], None], optimizer: Callable[[], None]) -> None:
        """Runs a training step under the operator clock.

        Args:
            passes: Forward and backward of all micro-batches.
            optimizer: The update; timed as a whole, its Python included.
        """
        with OperatorClock() as clock:
            passes()
        start = time.process_time_ns()
        optimizer()
        update_ns = time.process_time_ns() - start
        row: dict[str, list[float]] = {}
        for name, elapsed_ns in clock.calls:
            kind = KIND_OF_ATEN.get(name.removesuffix("_tanh").removesuffix("_complex"))
            if kind is not None:
                row.setdefault(self.kernel_class(kind, name), []).append((elapsed_ns - self._cost_ns) * 1e-9)
        row[self.kernel_class(OperatorKind.OPTIMIZER, "")] = [(update_ns - self._cost_ns) * 1e-9]
        self.rows.append(row)

    def seconds(self) -> dict[str, float]:
        """Returns the median over the steps, by class."""
        return _median_by_key([{name: sum(times) for name, times in row.items()} for row in self.rows])

    def calls(self) -> dict[str, int]:
        """Returns how many operators of each class the last step called."""
        optimizer = self.kernel_class(OperatorKind.OPTIMIZER, "")
        return {name: len(times) for name, times in self.rows[-1].items() if name != optimizer} if self.rows else {}

    def each_s(self) -> dict[str, list[float]]:
        """Returns the median time of every call, by class in program order; classes whose calls change from step to step are left out."""
        return {
            name: [median(times) for times in zip(*(row[name] for row in self.rows), strict=True)]
            for name in (self.rows[0] if self.rows else {})
            if len({len(row.get(name, ())) for row in self.rows}) == 1
        }


def _median_by_key(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the median of each key over rows that share their keys."""
    return {key: median(row[key] for row in rows) for key in rows[0]} if rows else {}
