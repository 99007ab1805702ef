"""Device time of each operator of a profiled training step: the kernels that it launched, itself or through others.

Operators are found by their names in the tree of calls that the profiler records; the outermost one with a known name counts, so that
what it calls (a copy inside a cast) is not counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from simtrain.core.workload import OperatorKind
from validation.operator_times import KIND_OF_ATEN

UPDATE = "simtrain::update"
"""Name of the region that holds the optimizer."""

_GPU_KINDS: dict[OperatorKind, tuple[str, ...]] = {
    OperatorKind.ATTENTION: tuple(f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
    OperatorKind.ATTENTION_BACKWARD: tuple(f"_scaled_dot_product_{kind}_attention_backward" for kind in ("flash", "efficient", "cudnn")),
    OperatorKind.BATCH_NORM: ("cudnn_batch_norm", "_batch_norm_with_update", "miopen_batch_norm"),
    OperatorKind.BATCH_NORM_BACKWARD: ("cudnn_batch_norm_backward", "batch_norm_backward", "miopen_batch_norm_backward"),
}
"""Operators that only GPUs have (torch/aten: native_functions.yaml of PyTorch 2.13)."""

KIND_OF_OPERATOR: dict[str, OperatorKind] = KIND_OF_ATEN | {name: kind for kind, names in _GPU_KINDS.items() for name in names}


def operator_row(
    events: Sequence[Any], device_us: Callable[[Any], float], kernel_class: Callable[[OperatorKind, str], str]
) -> dict[str, list[float]]:
    """Returns seconds of every operator call by class in program order; the optimizer is one call.

    Args:
        events: `FunctionEvent`s of PyTorch's profiler.
        device_us: Device time of an event with all that it calls, in microseconds.
        kernel_class: Maps a kind and an operator's name to its class.
    """
    row: dict[str, list[float]] = {}
    roots = [e for e in events if e.cpu_parent is None and e.device_type.name == "CPU"]
    for event in sorted(_outermost(roots), key=lambda e: e.time_range.start):
        seconds = device_us(event) * 1e-6
        if event.name == UPDATE:
            row.setdefault(kernel_class(OperatorKind.OPTIMIZER, ""), []).append(seconds)
        else:
            name = event.name.removeprefix("aten::")
            row.setdefault(kernel_class(KIND_OF_OPERATOR[name], name), []).append(seconds)
    return row


def _outermost(roots: Sequence[Any]) -> Iterator[Any]:
    """Yields the known operators and the update that lie in no other one."""
    stack = list(roots)
    while stack:
        event = stack.pop()
        if event.name == UPDATE or event.name.removeprefix("aten::") in KIND_OF_OPERATOR:
            yield event
        else:
            stack.extend(event.cpu_children)
