"""Arguments of Megatron-LM.

Source: NVIDIA/Megatron-LM at 000c4ac24f, `megatron/training/arguments.py` (looked up): the declarations of all arguments that are written
(names, kinds and choices are kept in the tests, which parse with them what is written), what `validate_args` refuses (see `_refused`), and
that reductions of gradients overlap with backward passes only if `--overlap-grad-reduce` is given. Layouts of uneven pipelines:
`core/transformer/pipeline_parallel_layer_layout.py` at 00caa53af3 (looked up). Its `main` was never run.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from simtrain.core.errors import InputError
from simtrain.core.runtime import Runtime
from simtrain.core.runtimes import runtime as find_runtime
from simtrain.core.strategy import Strategy
from simtrain.planner.launchers.form import Job, Written, accumulation_of, ranks_of, replicas, whole
from simtrain.step.shard import even_counts

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
SHARDING = {2: "optim_grads", 3: "optim_grads_params"}
STYLES = {"ring": "p2p", "ulysses": "a2a"}
OPTIMIZERS = {"adamw": "adam", "sgd-momentum": "sgd", "muon": "muon"}


def write(strategy: Strategy, job: Job) -> Written:
    """Writes the arguments, one per line."""
    s, unsaid = strategy, _refused(strategy)
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
    lines += _overlaps(s, job.runtime or find_runtime("megatron"))
    _pipeline(s, job.blocks, lines, unsaid)
    _recomputation(s, lines, unsaid)
    if s.precision not in PRECISIONS:
        unsaid["precision"] = f"{s.precision}: Megatron-LM keeps fp32 masters beside 16-bit weights (bf16-master, fp16-master)"
    lines += [PRECISIONS[s.precision]] if PRECISIONS.get(s.precision) else []
    if s.optimizer in OPTIMIZERS:
        lines.append(f"--optimizer {OPTIMIZERS[s.optimizer]}")
        lines += ["--ckpt-format torch"] * (s.optimizer == "muon" and s.zero < 2)
    else:
        unsaid["optimizer"] = f"{s.optimizer}: Megatron-LM's adam decays weights as AdamW does, its sgd has momentum"
    return Written(f"# Megatron-LM, {s.ranks} ranks{_queues(s)}\n" + "\n".join(lines) + "\n", unsaid)


def _refused(s: Strategy) -> dict[str, str]:
    """What `validate_args` does not let pass, although there are words for it."""
    unsaid = {}
    if s.precision == "fp8-params" and not s.zero:
        unsaid["precision"] = "fp8-params: Megatron-LM refuses --fp8-param-gather without its distributed optimizer (zero=1)"
    if s.precision == "fp16-master" and s.expert > 1:
        unsaid["precision"] = "fp16-master: Megatron-LM refuses expert parallelism with fp16"
    if s.optimizer == "muon" and s.zero:
        unsaid["optimizer"] = "muon: Megatron-LM refuses it with sharded states (zero=0)"
    return unsaid


def _queues(s: Strategy) -> str:
    """What the environment must say of hardware queues."""
    if s.zero > 1:
        return "; CUDA_DEVICE_MAX_CONNECTIONS must not be 1"
    return "; CUDA_DEVICE_MAX_CONNECTIONS=1 must be set before Blackwell" if s.tensor > 1 or s.context > 1 else ""


def _overlaps(s: Strategy, runtime: Runtime) -> list[str]:
    """What was planned to run beside something else; nothing of it is Megatron-LM's default."""
    if s.data * s.context == 1:
        return []
    gathers = s.zero and runtime.replicas.overlap_gather
    return ["--overlap-grad-reduce"] * runtime.replicas.overlap_communication + ["--overlap-param-gather"] * bool(gathers)


def _pipeline(s: Strategy, blocks: int, lines: list[str], unsaid: dict[str, str]) -> None:
    interleaved = s.pipeline > 1 and s.schedule == "interleaved"
    chunks = (s.chunks or 2) if interleaved else 1
    positions = s.pipeline * chunks
    if s.pipeline > 1 and (s.cuts or blocks % positions):
        counts = [int(n) for n in s.cuts.split("-")] if s.cuts else even_counts(blocks, positions)
        lines.append(f"--pipeline-model-parallel-layout '{_layout(counts)}'")
        if not s.cuts:
            unsaid["cuts"] = f"{blocks} blocks do not divide evenly over {positions} chunks, so they are written out"
    elif interleaved:
        lines.append(f"--num-virtual-stages-per-pipeline-rank {chunks}")
    if interleaved and s.chunks == 0:
        unsaid["chunks"] = "2 chunks, the schedule's own number, are written out"
    elif not interleaved:
        for name in ("schedule", "chunks"):
            if getattr(s, name) not in ("1f1b", 0):
                unsaid[name] = f"{name}={getattr(s, name)}: Megatron-LM runs 1f1b, or interleaved with chunks"


def _layout(counts: list[int] | tuple[int, ...]) -> str:
    """Blocks of each chunk from the input on: E stands for the embedding, t for a block, L for the loss."""
    return "E" + "|".join(f"t*{n}" for n in counts) + "L"


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
    sharding = {v: k for k, v in SHARDING.items()} | {"optim": 1, "no_shard": 0}
    zero = sharding.get(str(flags.get("data-parallel-sharding-strategy", "no_shard")), 0) if "use-megatron-fsdp" in flags else 0
    cuts = _cuts(str(flags.get("pipeline-model-parallel-layout", "")))
    virtual = len(cuts) // pipeline if cuts else _virtual(flags, pipeline)
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
        cuts="-".join(map(str, cuts)),
        context=context,
        context_style={v: k for k, v in STYLES.items()}.get(str(flags.get("cp-comm-type", "p2p")), "ring"),
        expert=number("expert-model-parallel-size"),
        **values,
    )


def _virtual(flags: dict[str, str | bool], pipeline: int) -> int:
    """Chunks of a stage, said as their number or as the layers of each.

    Raises:
        InputError: Layers of a chunk are given without the model's, or do not divide them.
    """
    if "num-layers-per-virtual-pipeline-stage" not in flags:
        return whole(flags.get("num-virtual-stages-per-pipeline-rank", 0), "--num-virtual-stages-per-pipeline-rank", NAME)
    each, layers = (whole(flags.get(n, 0), f"--{n}", NAME) for n in ("num-layers-per-virtual-pipeline-stage", "num-layers"))
    if layers < 1 or each < 1 or layers % (pipeline * each):
        raise InputError(f"{NAME}: --num-layers-per-virtual-pipeline-stage {each} needs --num-layers, a multiple of {pipeline} x {each}")
    return layers // (pipeline * each)


def _cuts(layout: str) -> tuple[int, ...]:
    """Blocks of each chunk of a layout; empty where it is.

    Raises:
        InputError: A letter other than E, t and L, of which simtrain's chunks are made.
    """
    text = layout.replace(",", "")
    text = re.sub(r"\(([^)]+)\)\*(\d+)", lambda m: m.group(1) * int(m.group(2)), text)
    text = re.sub(r"(.)\*(\d+)", lambda m: m.group(1) * int(m.group(2)), text)
    inner = text.removeprefix("E").removesuffix("L")
    if set(inner) - {"t", "|"}:
        raise InputError(f"{NAME}: a layout of E, blocks (t) cut by | and L can be read, not {layout!r}")
    return tuple(len(part) for part in inner.split("|")) if layout else ()


def _precision(flags: dict[str, str | bool]) -> str:
    if "fp8-format" not in flags:
        return "bf16-master" if "bf16" in flags else "fp16-master" if "fp16" in flags else "fp32"
    scaling = {"tensorwise": "fp8-current", "mxfp8": "mxfp8"}.get(str(flags.get("fp8-recipe", "delayed")), "fp8")
    return "fp8-params" if scaling == "fp8" and "fp8-param-gather" in flags else scaling


def _checkpoint(flags: dict[str, str | bool], layers: int) -> str:
    granularity = "selective" if "recompute-activations" in flags else flags.get("recompute-granularity")
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
