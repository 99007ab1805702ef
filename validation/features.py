"""What a training step asks of each class of operators, from the closed form: launches, FLOPs and bytes."""

from __future__ import annotations

import numpy as np

from hardware_models.cpu import bytes_done, calls_done, flops_done, kernel_class
from simtrain.core import catalog
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import precision
from simtrain.core.runtimes import runtime
from simtrain.core.workload import Workload
from simtrain.step.kernels import layer_kernels, optimizer_kernels
from simtrain.step.occupancy import Mode
from simtrain.step.passes import micro_batch_passes
from simtrain.step.specialize import concrete_layers
from validation.steps import TrainingStep

CPU_RUNTIME = "torch-eager-cpu"
GPU_RUNTIME = "torch-eager"


def runtime_of(device: Device) -> str:
    """Returns the runtime that steps of a device are measured under."""
    return CPU_RUNTIME if device.device_class == "cpu" else GPU_RUNTIME


def workload_of(step: TrainingStep) -> Workload:
    """Builds the closed form of a training step's model."""
    return catalog.workload(step.workload, seq_len=step.sequence or None, **step.options)


def class_features(step: TrainingStep) -> dict[str, FloatArray]:
    """Returns launches, FLOPs and bytes by class of one step without checkpointing and accumulation."""
    work, strategy = workload_of(step), step.parsed()
    recipe, runs_on = precision(strategy.precision), runtime(CPU_RUNTIME)
    totals: dict[str, FloatArray] = {}
    for layer in work.layers:
        for kernels in layer_kernels(layer, strategy.micro_batch, work.sequence, recipe, runs_on):
            _add(totals, kernels, layer.repeats)
    sizes = [p.elements for layer in work for p in layer.parameters if p.tied_to is None]
    _add(totals, optimizer_kernels(sizes, strategy.optimizer, recipe, runs_on), 1)
    return totals


def _add(totals: dict[str, FloatArray], kernels: KernelBatch, times: int) -> None:
    rows = np.column_stack([calls_done(kernels), flops_done(kernels), bytes_done(kernels)]) * times
    for kind, operator, row in zip(kernels.kinds, kernels.names, rows, strict=True):
        name = kernel_class(kind, operator)
        totals[name] = totals.get(name, np.zeros(3)) + row


def executed_flops(step: TrainingStep) -> float:
    """FLOPs that one step carries out: recomputation counted, causal attention as done."""
    work, strategy = workload_of(step), step.parsed()
    total = work.model_flops(strategy.micro_batch, causal_as_done=True)
    if strategy.checkpoint != "none":
        blocks = (layer for layer in work.layers if layer.repeats > 1)
        total += sum(layer.repeats * op.flops(strategy.micro_batch, work.sequence) for layer in blocks for op in layer.forward)
    return strategy.accumulation * total


def saved_tensors(step: TrainingStep) -> int:
    """Tensors that one step of a checkpointed model saves a second time, while it recomputes."""
    work, strategy = workload_of(step), step.parsed()
    concrete = concrete_layers(work, precision(strategy.precision), runtime(CPU_RUNTIME))
    passes = micro_batch_passes(work, concrete, strategy.checkpoint, accumulating=False)
    return strategy.accumulation * sum(len(concrete[p.kind].saved) for p in passes if p.mode is Mode.RECOMPUTE)
