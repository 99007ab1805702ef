"""Time inside each PyTorch operator of a real training step, where it runs: warm or cold caches as they are.

Timing operators on their own is 5 to 26 % too fast on a CPU, because their operands are still in the cache.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

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
        time_ns: Time by ATen name, the clock's own cost not taken off.
        calls: Calls by ATen name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.time_ns: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator between two readings of the clock."""
        kwargs = kwargs or {}
        start = time.process_time_ns()
        out = func(*args, **kwargs)
        elapsed = time.process_time_ns() - start
        name = func._schema.name.removeprefix("aten::")
        self.time_ns[name] += elapsed
        self.calls[name] += 1
        return out


def clock_cost_ns(samples: int = 2000) -> float:
    """Returns what reading the clock twice in a row shows."""
    readings = [time.process_time_ns() for _ in range(samples)]
    return median(b - a for a, b in pairwise(readings))


class ClassTimes:
    """Adds up what several training steps spend in each class of operators.

    Args:
        kernel_class: Maps a kind to the name of its class.

    Attributes:
        rows: For each step, seconds by class.
        calls: Operator calls by class in the last step.
    """

    def __init__(self, kernel_class: Callable[[OperatorKind], str]) -> None:
        self.kernel_class = kernel_class
        self.rows: list[dict[str, float]] = []
        self.calls: dict[str, int] = {}
        self._cost_ns = clock_cost_ns()

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
        update_ns = time.process_time_ns() - start - self._cost_ns
        times_ns = self._by_class({n: t - self._cost_ns * clock.calls[n] for n, t in clock.time_ns.items()})
        times_ns[self.kernel_class(OperatorKind.OPTIMIZER)] = update_ns
        self.rows.append({name: t * 1e-9 for name, t in times_ns.items()})
        self.calls = {name: int(n) for name, n in self._by_class(clock.calls).items()}

    def seconds(self) -> dict[str, float]:
        """Returns the median over the steps, by class."""
        return median_by_key(self.rows)

    def _by_class(self, by_name: Mapping[str, float]) -> dict[str, float]:
        total: dict[str, float] = {}
        for name, value in by_name.items():
            if name in KIND_OF_ATEN:
                key = self.kernel_class(KIND_OF_ATEN[name])
                total[key] = total.get(key, 0.0) + value
        return total


def median_by_key(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the median of each key over rows that share their keys."""
    return {key: median(row[key] for row in rows) for key in rows[0]} if rows else {}
