"""Mixtures of experts in a captured model: whose weights they are, what is assumed, and experts that run one after the other."""

from __future__ import annotations

from dataclasses import replace

from simtrain.core.workload import Operator, OperatorKind, Role, Workload
from simtrain.torch.kinds import GROUPED
from simtrain.torch.recording import Call, Phase, Recording

_PASSING_ON = ("_to_copy", "clone")


def expert_parameters(recording: Recording) -> frozenset[str]:
    """Returns the names of parameters that grouped products multiply by, as they are or in another format."""
    sources = {s: call.inputs[0].storage for call in recording.calls if call.short_name in _PASSING_ON for s in call.new if call.inputs}
    read = {view.storage for call in _products(recording) for view in call.inputs[:2]}
    given = (recording.given.get(sources.get(s, s), "") for s in read)
    return frozenset(name.removeprefix("parameter:") for name in given if name.startswith("parameter:"))


def expert_assumptions(recording: Recording) -> tuple[str, ...]:
    """Says what is assumed of a router that is seen without values, and which products run in which format."""
    products = _products(recording)
    if not products:
        return ()
    said = [
        "the router's choices are taken to be spread evenly over the experts: shapes say how many they are, not on whom they fall",
        "all experts multiply in one kernel, which PyTorch has for bf16 on GPUs of compute capability 9 and 10 (2.10); elsewhere it waits "
        "for the router and multiplies one expert after the other: a runtime with grouped_experts=False launches these",
    ]
    if any(view.dtype == "float32" for call in products for view in call.inputs[:2]):
        said.append(
            "PyTorch's autocast does not know grouped products: in mixed precision the experts multiply in fp32, as this model is written; "
            "precision=bf16 has them in bf16"
        )
    return tuple(said)


def one_after_another(workload: Workload) -> Workload:
    """Returns a workload whose experts' products are launched one by one; the device takes as long."""

    def launched(op: Operator) -> Operator:
        grouped = op.kind is OperatorKind.BATCHED_GEMM and op.dims[0].role is Role.EXPERTS
        return replace(op, launches=round(op.dims[0].size(1, 1))) if grouped else op

    layers = tuple(
        replace(layer, forward=tuple(map(launched, layer.forward)), backward=tuple(map(launched, layer.backward)))
        for layer in workload.layers
    )
    return replace(workload, layers=layers)


def _products(recording: Recording) -> list[Call]:
    return [call for call in recording.calls if call.phase is Phase.FORWARD and call.short_name == GROUPED]
