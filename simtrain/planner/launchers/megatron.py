"""Arguments of Megatron-LM.

Source: NVIDIA/Megatron-LM at 000c4ac24f, `megatron/training/arguments.py`: the declarations of the arguments (names, kinds and choices are
kept in the tests, which parse with them what is written) and what `validate_args` asks for, such as `--ckpt-format fsdp_dtensor` and more
than one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS) with `--use-megatron-fsdp`. `--sequence-parallel`, `--bf16`, `--fp16`,
`--optimizer` and `--expert-model-parallel-size`: README of its "Distributed Optimizer" and Megatron Core's parallelism guide and
`ModelParallelConfig`. Its `main` was never run.
"""

from __future__ import annotations

import shlex
from typing import Any

from simtrain.core.errors import InputError
from simtrain.core.strategy import Strategy
from simtrain.planner.launchers.form import Written, accumulation_of, ranks_of, replicas, whole

NAME = "Megatron-LM"
PRECISIONS = {
    "fp8": "--bf16 --fp8-format hybrid",
    "fp8-params": "--bf16 --fp8-format hybrid --fp8-param-gather",
    "fp8-current": "--bf16 --fp8-format hybrid --fp8-recipe tensorwise",
    "mxfp8": "--bf16 --fp8-format e4m3 --fp8-recipe mxfp8",
    "bf16-master": "--bf16",
    "fp16-master": "--fp16",
    "fp32": "",
}
"""Flags of recipes; those of fp8 are recalled, not looked up."""
SHARDING = {2: "optim_grads", 3: "optim_grads_params"}
FSDP_NEEDS = "; CUDA_DEVICE_MAX_CONNECTIONS must not be 1"
STYLES = {"ring": "p2p", "ulysses": "a2a"}
OPTIMIZERS = {"adamw": "adam", "sgd-momentum": "sgd"}


def write(strategy: Strategy, per_node: int) -> Written:
    """Writes the arguments, one per line."""
    del per_node
    s, unsaid = strategy, {}
    lines = [f"--tensor-model-parallel-size {s.tensor}", f"--pipeline-model-parallel-size {s.pipeline}"]
    lines += [f"--context-parallel-size {s.context}", f"--expert-model-parallel-size {s.expert}"]
    lines += [f"--micro-batch-size {s.micro_batch}", f"--global-batch-size {s.global_batch}"]
    lines += ["--sequence-parallel"] * s.sequence_parallel
    if s.context > 1 and s.context_style in STYLES:
        lines.append(f"--cp-comm-type {STYLES[s.context_style]}")
    elif s.context_style != "ring":
        unsaid["context_style"] = f"Megatron-LM has no {s.context_style}" if s.context > 1 else "it matters with context above 1 only"
    if s.zero == 1:
        lines.append("--use-distributed-optimizer")
    elif s.zero:
        lines += ["--use-megatron-fsdp", f"--data-parallel-sharding-strategy {SHARDING[s.zero]}", "--ckpt-format fsdp_dtensor"]
    if s.shard:
        unsaid["shard"] = f"sharding over groups of {s.shard} ranks"
    _pipeline(s, lines, unsaid)
    _recomputation(s, lines, unsaid)
    if s.precision not in PRECISIONS:
        unsaid["precision"] = f"{s.precision}: Megatron-LM keeps fp32 masters beside 16-bit weights (bf16-master, fp16-master)"
    lines += [PRECISIONS[s.precision]] if PRECISIONS.get(s.precision) else []
    if s.optimizer in OPTIMIZERS:
        lines.append(f"--optimizer {OPTIMIZERS[s.optimizer]}")
    else:
        unsaid["optimizer"] = f"{s.optimizer}: Megatron-LM's adam decays weights as AdamW does, its sgd has momentum"
    head = f"# Megatron-LM, {s.ranks} ranks{FSDP_NEEDS if s.zero > 1 else ''}\n"
    return Written(head + "\n".join(lines) + "\n", unsaid)


def _pipeline(s: Strategy, lines: list[str], unsaid: dict[str, str]) -> None:
    interleaved = s.pipeline > 1 and s.schedule == "interleaved"
    if interleaved:
        lines.append(f"--num-virtual-stages-per-pipeline-rank {s.chunks or 2}")
        if s.chunks == 0:
            unsaid["chunks"] = "2 chunks, the schedule's own number, are written out"
    elif s.schedule != "1f1b" or s.chunks:
        for name in ("schedule", "chunks"):
            if getattr(s, name) not in ("1f1b", 0):
                unsaid[name] = f"{name}={getattr(s, name)}: Megatron-LM runs 1f1b, or interleaved with chunks"


def _recomputation(s: Strategy, lines: list[str], unsaid: dict[str, str]) -> None:
    if s.checkpoint == "selective":
        lines.append("--recompute-granularity selective")
    elif s.checkpoint == "full" or s.checkpoint.startswith("every:"):
        layers = 1 if s.checkpoint == "full" else int(s.checkpoint.partition(":")[2])
        lines += ["--recompute-granularity full", "--recompute-method uniform", f"--recompute-num-layers {layers}"]
        if s.checkpoint == "every:1":
            unsaid["checkpoint"] = "every:1 is what full means"
    elif s.checkpoint != "none":
        unsaid["checkpoint"] = f"{s.checkpoint}: say how many layers (every:K)"


def read(text: str, ranks: int | None) -> Strategy:
    """Reads arguments.

    Raises:
        InputError: They do not make sense, or the ranks are needed.
    """
    flags = _flags(text)

    def number(name: str, default: int = 1) -> int:
        return whole(flags.get(name, default), f"--{name}", NAME)

    tensor, pipeline, context = (number(f"{n}-parallel-size") for n in ("tensor-model", "pipeline-model", "context"))
    data = replicas(ranks_of(text, ranks, NAME), tensor * pipeline * context, NAME)
    micro_batch = number("micro-batch-size")
    virtual = number("num-virtual-stages-per-pipeline-rank", 0)
    sharding = {v: k for k, v in SHARDING.items()} | {"optim": 1, "no_shard": 0}
    zero = sharding.get(str(flags.get("data-parallel-sharding-strategy", "no_shard")), 0) if "use-megatron-fsdp" in flags else 0
    values: dict[str, Any] = {"schedule": "interleaved", "chunks": virtual} if virtual > 1 else {}
    return Strategy(
        data=data,
        micro_batch=micro_batch,
        accumulation=accumulation_of(number("global-batch-size", micro_batch * data), micro_batch, data, NAME),
        precision=_precision(flags),
        optimizer={v: k for k, v in OPTIMIZERS.items()}.get(str(flags.get("optimizer", "adam")), "adamw"),
        checkpoint=_checkpoint(flags, number("recompute-num-layers")),
        zero=1 if "use-distributed-optimizer" in flags and not zero else zero,
        tensor=tensor,
        sequence_parallel="sequence-parallel" in flags,
        pipeline=pipeline,
        context=context,
        context_style={v: k for k, v in STYLES.items()}.get(str(flags.get("cp-comm-type", "p2p")), "ring"),
        expert=number("expert-model-parallel-size"),
        **values,
    )


def _precision(flags: dict[str, str | bool]) -> str:
    if "fp8-format" not in flags:
        return "bf16-master" if "bf16" in flags else "fp16-master" if "fp16" in flags else "fp32"
    scaling = {"tensorwise": "fp8-current", "mxfp8": "mxfp8"}.get(str(flags.get("fp8-recipe", "delayed")), "fp8")
    return "fp8-params" if scaling == "fp8" and "fp8-param-gather" in flags else scaling


def _checkpoint(flags: dict[str, str | bool], layers: int) -> str:
    granularity = flags.get("recompute-granularity")
    if granularity == "full":
        return "full" if layers == 1 else f"every:{layers}"
    return "selective" if granularity == "selective" else "none"


def _flags(text: str) -> dict[str, str | bool]:
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    flags: dict[str, str | bool] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else True
            flags[word.removeprefix("--")] = value
    if not flags:
        raise InputError(f"{NAME}: there are no arguments of the form --name value in it")
    return flags
