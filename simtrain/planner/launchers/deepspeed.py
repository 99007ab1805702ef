"""JSON of DeepSpeed.

Source: configuration files of projects that use it (shibing624/MedicalGPT, pppa2019/Mango: `train_batch_size`,
`train_micro_batch_size_per_gpu`, `gradient_accumulation_steps`, `zero_optimization.stage`, `bf16` and `fp16` with `enabled`, `optimizer`);
DeepSpeed's documentation of `offload_optimizer` and `offload_param` with `device` and `pin_memory` (recalled, not looked up).
DeepSpeed 0.19.8's own `DeepSpeedConfig` accepted what is written (without offloading) and read the same numbers from it; there "Adam"
decays weights as AdamW does unless `adam_w_mode` says otherwise (`runtime/config.py`, `runtime/engine.py`). Degrees of tensor and pipeline
parallelism are no part of that file: the program builds them.
"""

from __future__ import annotations

import json
from typing import Any

from simtrain.core.errors import InputError
from simtrain.core.strategy import Strategy
from simtrain.planner.launchers.form import Job, Written, beyond, whole

NAME = "DeepSpeed"
ELSEWHERE = ("tensor", "sequence_parallel", "pipeline", "schedule", "chunks", "context", "context_style", "expert", "checkpoint", "shard")
OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam"}
PLACES = {"host": "cpu", "nvme": "nvme"}
PRECISIONS = {"bf16-master": "bf16", "fp16-master": "fp16", "fp32": ""}


def write(strategy: Strategy, job: Job) -> Written:
    """Writes the configuration."""
    del job
    s = strategy
    unsaid = beyond(s, ELSEWHERE, "DeepSpeed's file")
    config: dict[str, Any] = {
        "train_batch_size": s.global_batch,
        "train_micro_batch_size_per_gpu": s.micro_batch,
        "gradient_accumulation_steps": s.accumulation,
        "zero_optimization": {"stage": s.zero} | _offload(s),
    }
    if s.precision in PRECISIONS:
        config |= {kind: {"enabled": PRECISIONS[s.precision] == kind} for kind in ("bf16", "fp16")}
    else:
        unsaid["precision"] = f"{s.precision}: DeepSpeed keeps fp32 masters beside 16-bit weights (bf16-master, fp16-master)"
    if s.optimizer in OPTIMIZERS:
        config["optimizer"] = {"type": OPTIMIZERS[s.optimizer], "params": {"adam_w_mode": s.optimizer == "adamw"}}
    else:
        unsaid["optimizer"] = f"{s.optimizer}: give the program's own"
    return Written(json.dumps(config, indent=2) + "\n", unsaid)


def _offload(strategy: Strategy) -> dict[str, Any]:
    """What moves, as far as the file can say: gradients go with the optimizer, to host memory; activations are the program's."""
    moved = strategy.moved
    if moved.gradients != "host" or moved.activations:
        return {}
    parts = {"offload_optimizer": moved.optimizer, "offload_param": moved.parameters}
    return {name: {"device": PLACES[place], "pin_memory": True} for name, place in parts.items() if place}


def _moved(zero: dict[str, Any]) -> str:
    """Reads what moves.

    Raises:
        InputError: A device that is neither the host nor its drives.
    """
    known = {device: place for place, device in PLACES.items()}
    devices = {part: str(zero.get(part, {}).get("device", "none")) for part in ("offload_optimizer", "offload_param")}
    for part, device in devices.items():
        if device not in (*known, "none"):
            raise InputError(f"{NAME}: zero_optimization.{part}.device must be cpu, nvme or none, not {device!r}")
    optimizer, weights = (known.get(device, "") for device in devices.values())
    if not optimizer:
        return "none"
    parts = [f"optimizer:{optimizer}" if optimizer == "nvme" else "optimizer", "gradients"]
    return "+".join([*parts, *([f"parameters:{weights}" if weights == "nvme" else "parameters"] if weights else [])])


def read(text: str, ranks: int | None) -> Strategy:
    """Reads the configuration.

    Raises:
        InputError: It is no JSON, or leaves batches to be filled in ("auto").
    """
    del ranks
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{NAME}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{NAME}: the configuration must be a JSON object")
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    missing = [n for n in names if n not in config]
    if missing:
        raise InputError(f"{NAME}: {', '.join(missing)} must be stated")
    batch, micro_batch, accumulation = (whole(config[n], n, NAME) for n in names)
    if micro_batch < 1 or accumulation < 1 or batch % (micro_batch * accumulation):
        raise InputError(f"{NAME}: train_batch_size={batch} is no multiple of micro-batch {micro_batch} x accumulation {accumulation}")
    enabled = [p for p, kind in PRECISIONS.items() if kind and config.get(kind, {}).get("enabled") is True]
    optimizer = config.get("optimizer", {})
    kind = str(optimizer.get("type", "AdamW"))
    if kind == OPTIMIZERS["adam"] and optimizer.get("params", {}).get("adam_w_mode", True):
        kind = OPTIMIZERS["adamw"]
    return Strategy(
        data=batch // (micro_batch * accumulation),
        micro_batch=micro_batch,
        accumulation=accumulation,
        precision=enabled[0] if enabled else "fp32",
        optimizer={v: k for k, v in OPTIMIZERS.items()}.get(kind, "adamw"),
        zero=whole(config.get("zero_optimization", {}).get("stage", 0), "zero_optimization.stage", NAME),
        offload=_moved(config.get("zero_optimization", {})),
    )
