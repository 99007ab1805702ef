"""How a workload is trained: everything a person chooses, immutable, printable, and the same in TOML and on the command line.

`Strategy(data=4, micro_batch=2)` is sugar for one replica template copied four times; `plan` states uneven or mixed replicas in full.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, fields, replace
from typing import Any

from simtrain.core.checkpoint import INSIDE, budget_bytes, is_explicit, is_optimal, parse_blocks
from simtrain.core.errors import StrategyError, UnknownNameError, nearest
from simtrain.core.exchange import compression_method, low_communication_method
from simtrain.core.offload import Offload, parse_offload
from simtrain.core.precision import precision as find_precision
from simtrain.core.tensorize import parse_tensorize

OPTIMIZERS: dict[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1, "adamw-8bit": 2, "muon": 2}
"""State tensors per parameter of each optimizer (of Muon: one of matrices inside blocks, two of what AdamW updates)."""

CONTEXT_STYLES = ("ring", "ring-contiguous", "ulysses")
"""How attention is computed over a sequence that several ranks share; see `simtrain.core.workload.Form`."""

_SUGAR = ("data", "micro_batch", "accumulation", "tensor", "pipeline", "context", "expert")


@dataclass(frozen=True, slots=True)
class StageTemplate:
    """A pipeline stage of a replica.

    Attributes:
        device: Name of the device type it runs on ("" for whatever the cluster has there).
        layers: Half-open range of layers; `(0, -1)` means all.
        tensor: Tensor-parallel degree.
        context: Context-parallel degree.
        expert: Expert-parallel degree.
        checkpoint: Activation checkpointing in this stage ("" for the strategy's).
    """

    device: str = ""
    layers: tuple[int, int] = (0, -1)
    tensor: int = 1
    context: int = 1
    expert: int = 1
    checkpoint: str = ""

    def __post_init__(self) -> None:
        _check_counts(self, "tensor", "context", "expert")
        if len(self.layers) != 2 or any(type(n) is not int for n in self.layers) or self.layers[0] < 0 or self.layers[1] < -1:
            raise StrategyError(f"layers must be a first layer and the one behind the last, or (0, -1) for all, not {self.layers!r}")


@dataclass(frozen=True, slots=True)
class ReplicaTemplate:
    """One kind of model replica: stages in order, and the micro-batch it processes."""

    stages: tuple[StageTemplate, ...]
    micro_batch: int

    def __post_init__(self) -> None:
        _check_counts(self, "micro_batch")
        if not self.stages:
            raise StrategyError("a replica has at least one stage")


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """Equal replicas: a template, how many copies, and how many micro-batches each processes per step."""

    template: ReplicaTemplate
    copies: int
    micro_batches: int

    def __post_init__(self) -> None:
        _check_counts(self, "copies", "micro_batches")

    def __str__(self) -> str:
        """A short form for reports, such as `2x(v100[0:12] | v100[12:24], 4 micro-batches of 2)`."""
        stages = " | ".join(f"{s.device or 'any'}[{s.layers[0]}:{'end' if s.layers[1] < 0 else s.layers[1]}]" for s in self.template.stages)
        return f"{self.copies}x({stages}, {self.micro_batches} micro-batches of {self.template.micro_batch})"


@dataclass(frozen=True, slots=True)
class Strategy:
    """What a person chooses.

    Attributes:
        data: Data-parallel degree.
        micro_batch: Samples per forward pass of a replica.
        accumulation: Micro-batches per replica and step.
        precision: A recipe of `simtrain.core.precision`.
        optimizer: "adamw", "adam", "sgd", "sgd-momentum", "adamw-8bit" or "muon" (`simtrain.step.optimizers`).
        checkpoint: Activation checkpointing: "none", "full" (every layer), "sqrt" (segments of about the square root of the depth),
            "every:K", "selective" (attention scores and probabilities only), "selective-op" (operators inside blocks, all but attention and
            every second product: torchtitan's rule, `simtrain.step.selective`), "optimal" or "optimal:8GiB" (the least recomputation with
            which a device's memory, or so much of it, suffices), or explicit blocks such as "layers:0-3,8" (`simtrain.core.checkpoint`).
        zero: ZeRO stage: 0 replicates everything, 1 shards the optimizer state, 2 also gradients, 3 also parameters (FSDP).
        shard: Ranks over which ZeRO shards; 0 for all that hold the same part of the model, fewer for hybrid sharding.
        tensor: Tensor-parallel degree.
        sequence_parallel: Whether tensor-parallel ranks split what lies between their products along the sequence.
        pipeline: Pipeline stages.
        schedule: Pipeline schedule, a name of `simtrain.step.schedules`; matters only with more than one stage.
        chunks: Model chunks per pipeline rank, for schedules that interleave; 0 for what the schedule takes by itself.
        cuts: Blocks of each model chunk from the input on, such as "2-4-4-2"; empty for even ones. What stands before the first block
            belongs to the first chunk, what stands behind the last one to the last chunk, and these two may have no block at all.
        context: Context-parallel degree.
        context_style: A name of `CONTEXT_STYLES`.
        expert: Expert-parallel degree; expert-parallel ranks are taken from the data- and context-parallel ones.
        compression: What is exchanged of gradients: "none" (all of them), "16-bit", "8-bit", "1-bit", "powersgd:RANK", "topk:DENSITY", or
            "zero++" (quantized gathers and gradients of ZeRO stage 3).
        low_communication: "local-sgd:STEPS" or "diloco:STEPS" where replicas synchronise every so many steps; "" for in every step.
        offload: What leaves the device between its uses, such as "optimizer+gradients" or "parameters:nvme" (`simtrain.core.offload`).
        tensorize: Weights of the blocks as products of small tensors: "none", or such as "low-rank:rank=64" or "tucker:compression=4"
            (`simtrain.core.tensorize`). It changes the model: what it does to the loss is not predicted.
        plan: Replica groups in full; overrides the sugar above.
    """

    data: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpoint: str = "none"
    zero: int = 0
    shard: int = 0
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    schedule: str = "1f1b"
    chunks: int = 0
    cuts: str = ""
    context: int = 1
    context_style: str = "ring"
    expert: int = 1
    compression: str = "none"
    low_communication: str = ""
    offload: str = "none"
    tensorize: str = "none"
    plan: tuple[ReplicaGroup, ...] = ()

    def __post_init__(self) -> None:
        _check_counts(self, *_SUGAR)
        if self.zero not in (0, 1, 2, 3) or type(self.zero) is not int:
            raise StrategyError(f"zero must be 0, 1, 2 or 3, not {self.zero!r}")
        for name, what in (("shard", "ranks, or 0 for all"), ("chunks", "model chunks, or 0 for what the schedule takes")):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise StrategyError(f"{name} must be a whole number of {what}, not {value!r}")
        if not isinstance(self.sequence_parallel, bool):
            raise StrategyError(f"sequence_parallel must be true or false, not {self.sequence_parallel!r}")
        for name in (
            "precision",
            "optimizer",
            "checkpoint",
            "schedule",
            "context_style",
            "cuts",
            "compression",
            "low_communication",
            "offload",
            "tensorize",
        ):
            if not isinstance(getattr(self, name), str):
                raise StrategyError(f"{name} must be text, not {getattr(self, name)!r}")
        find_precision(self.precision)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        if self.context_style not in CONTEXT_STYLES:
            raise UnknownNameError("context style", self.context_style, CONTEXT_STYLES)
        checkpoint_segment(self.checkpoint, 1)
        compression_method(self.compression)
        low_communication_method(self.low_communication)
        parse_offload(self.offload)
        parse_tensorize(self.tensorize)
        counts = self.blocks_per_chunk
        if counts and (len(counts) % self.pipeline or (self.chunks and len(counts) != self.pipeline * self.chunks)):
            times = f" x chunks={self.chunks}" if self.chunks else ""
            fix = f"use chunks={len(counts) // self.pipeline}" if len(counts) % self.pipeline == 0 else "leave cuts empty"
            raise StrategyError(
                f"cuts={self.cuts} names {len(counts)} chunks, which pipeline={self.pipeline}{times} does not divide into: {fix}"
            )

    @property
    def blocks_per_chunk(self) -> tuple[int, ...]:
        """The numbers in `cuts`.

        Raises:
            StrategyError: It is not of the form 2-4-4-2, or a chunk in the middle is empty.
        """
        parts = self.cuts.split("-") if self.cuts else []
        if not all(part.isascii() and part.isdecimal() for part in parts):
            raise StrategyError(f"cuts must be numbers of blocks joined by '-', such as 2-4-4-2, not {self.cuts!r}")
        counts = tuple(int(part) for part in parts)
        if 0 in counts[1:-1]:
            raise StrategyError(f"cuts={self.cuts} leaves a chunk in the middle empty; only the first and the last may have 0 blocks")
        return counts

    @property
    def moved(self) -> Offload:
        """What `offload` says."""
        return parse_offload(self.offload)

    @property
    def replicas(self) -> tuple[ReplicaGroup, ...]:
        """The plan of replicas, with the sugar expanded."""
        if self.plan:
            return self.plan
        stage = StageTemplate(tensor=self.tensor, context=self.context, expert=self.expert)
        template = ReplicaTemplate(stages=(stage,) * self.pipeline, micro_batch=self.micro_batch)
        return (ReplicaGroup(template, self.data, self.accumulation),)

    @property
    def global_batch(self) -> int:
        """Samples per optimizer update."""
        return sum(g.template.micro_batch * g.copies * g.micro_batches for g in self.replicas)

    @property
    def ranks(self) -> int:
        """Devices it needs."""
        return sum(g.copies * sum(s.tensor * s.context for s in g.template.stages) for g in self.replicas)

    def with_(self, **changes: Any) -> Strategy:
        """Returns a copy with some choices changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        """Writes what differs from the defaults as `field=value` pairs; `parse` reads it back unless there is a `plan`."""
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "plan" and getattr(self, f.name) != f.default]
        if self.plan:
            pairs = [(name, value) for name, value in pairs if name not in _SUGAR] + [("plan", " + ".join(map(str, self.plan)))]
        return ",".join(f"{name}={value}" for name, value in pairs) or "data=1"

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Reads `"data=4,micro_batch=2,precision=fp16-amp"`.

        Raises:
            StrategyError: A pair without `=`, a field given twice, an unknown field (the nearest is suggested) or a value that is no
                whole number.
        """
        given: dict[str, Any] = {}
        for pair in _pairs(text):
            name, equals, value = pair.partition("=")
            if not equals:
                raise StrategyError(f"{pair!r} is not of the form field=value")
            if name.strip() in given:
                raise StrategyError(f"{name.strip()} is given twice: {given[name.strip()]} and {value.strip()}")
            given[name.strip()] = value.strip()
        return cls.from_dict(given)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Strategy:
        """Builds a strategy from field names and values (numbers may be text).

        Raises:
            StrategyError: See `parse`.
        """
        defaults = {f.name: f.default for f in fields(cls) if f.name != "plan"}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in defaults:
                near = nearest(name, defaults)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(defaults)}"
                raise StrategyError(f"a strategy has no field {name!r}: {hint}")
            if isinstance(defaults[name], bool) and isinstance(value, str):
                values[name] = _truth(name, value)
            elif isinstance(defaults[name], int) and isinstance(value, str):
                values[name] = _whole_number(name, value)
            else:
                values[name] = value
        return cls(**values)

    def to_toml(self) -> str:
        """Writes the strategy as TOML; `from_toml` reads it back."""
        if self.plan:
            raise StrategyError("a strategy with an explicit plan of replicas has no TOML form yet")
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "plan")
        return "".join(f'{n} = "{v}"\n' if isinstance(v, str) else f"{n} = {str(v).lower()}\n" for n, v in pairs)

    @classmethod
    def from_toml(cls, text: str) -> Strategy:
        """Reads what `to_toml` wrote.

        Raises:
            StrategyError: Broken TOML (with its line) or unknown fields.
        """
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise StrategyError(f"strategy is not valid TOML: {error}") from None


def _check_counts(chosen: object, *names: str) -> None:
    for name in names:
        value = getattr(chosen, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StrategyError(f"{name} must be a whole number of at least 1, not {value!r}")


def _pairs(text: str) -> list[str]:
    """Splits at commas, but not at those between the blocks of `checkpoint=layers:0-3,8` or `offload=activations(0-3,8)`."""
    pairs: list[str] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        inside = pairs and (re.match(r"checkpoint\s*=\s*layers:", pairs[-1]) or pairs[-1].count("(") > pairs[-1].count(")"))
        if "=" not in piece and inside:
            pairs[-1] += f",{piece}"
        else:
            pairs.append(piece)
    return pairs


def _truth(name: str, text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise StrategyError(f"{name} must be true or false, not {text!r}")


def _whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        hint = "; fields are separated by commas" if "=" in text else ""
        raise StrategyError(f"{name} must be a whole number, not {text!r}{hint}") from None


def checkpoint_segment(checkpoint: str, depth: int) -> int:
    """Layers per recomputed segment; 0 means that nothing is recomputed.

    Args:
        checkpoint: "none", "full", "sqrt", "selective" or "selective-op" (no whole layer), or "every:K"; "optimal" and explicit blocks have
            no fixed length and give 0.
        depth: Layers that can be checkpointed.

    Raises:
        StrategyError: Anything else.
    """
    if checkpoint in ("none", *INSIDE):
        return 0
    if checkpoint == "full":
        return 1
    if checkpoint == "sqrt":
        return max(1, round(math.sqrt(depth)))
    if is_explicit(checkpoint) and parse_blocks(checkpoint):
        return 0
    if is_optimal(checkpoint) and budget_bytes(checkpoint) != 0:
        return 0
    head, colon, tail = checkpoint.partition(":")
    if head == "every" and colon and tail.isdecimal() and int(tail) >= 1:
        return int(tail)
    raise StrategyError(
        "checkpoint must be none, full, sqrt, selective or every:K with K at least 1, selective-op, optimal, optimal:8GiB or layers:0-3,8, "
        f"not {checkpoint!r}"
    )
