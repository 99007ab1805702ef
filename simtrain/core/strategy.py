"""How a workload is trained: everything a person chooses, immutable, printable, and the same in TOML and on the command line.

`Strategy(data=4, micro_batch=2)` is sugar for one replica template copied four times; `plan` states uneven or mixed replicas in full.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from typing import Any

from simtrain.core.errors import StrategyError, UnknownNameError, nearest
from simtrain.core.precision import precision as find_precision

OPTIMIZERS: dict[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1}
"""State tensors per parameter of each optimizer."""

SCHEDULES = ("none",)
"""Pipeline schedules that are modelled."""

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


@dataclass(frozen=True, slots=True)
class ReplicaTemplate:
    """One kind of model replica: stages in order, and the micro-batch it processes."""

    stages: tuple[StageTemplate, ...]
    micro_batch: int


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """Equal replicas: a template, how many copies, and how many micro-batches each processes per step."""

    template: ReplicaTemplate
    copies: int
    micro_batches: int

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
        optimizer: "adamw", "adam", "sgd" or "sgd-momentum".
        checkpoint: Activation checkpointing: "none", "full" (every layer), "sqrt" (segments of about the square root of the depth) or
            "every:K".
        zero: ZeRO stage (0 replicates everything, 1 shards the optimizer state).
        tensor: Tensor-parallel degree.
        pipeline: Pipeline stages.
        context: Context-parallel degree.
        expert: Expert-parallel degree.
        schedule: Pipeline schedule.
        plan: Replica groups in full; overrides the sugar above.
    """

    data: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpoint: str = "none"
    zero: int = 0
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    schedule: str = "none"
    plan: tuple[ReplicaGroup, ...] = ()

    def __post_init__(self) -> None:
        for name in _SUGAR:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise StrategyError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.zero not in (0, 1, 2, 3) or type(self.zero) is not int:
            raise StrategyError(f"zero must be 0, 1, 2 or 3, not {self.zero!r}")
        for name in ("precision", "optimizer", "checkpoint", "schedule"):
            if not isinstance(getattr(self, name), str):
                raise StrategyError(f"{name} must be text, not {getattr(self, name)!r}")
        find_precision(self.precision)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise UnknownNameError("schedule", self.schedule, SCHEDULES)
        checkpoint_segment(self.checkpoint, 1)

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
        for pair in filter(None, (p.strip() for p in text.split(","))):
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
            if isinstance(defaults[name], int) and isinstance(value, str):
                values[name] = _whole_number(name, value)
            else:
                values[name] = value
        return cls(**values)

    def to_toml(self) -> str:
        """Writes the strategy as TOML; `from_toml` reads it back."""
        if self.plan:
            raise StrategyError("a strategy with an explicit plan of replicas has no TOML form yet")
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "plan")
        return "".join(f'{n} = "{v}"\n' if isinstance(v, str) else f"{n} = {v}\n" for n, v in pairs)

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


def _whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise StrategyError(f"{name} must be a whole number, not {text!r}") from None


def checkpoint_segment(checkpoint: str, depth: int) -> int:
    """Layers per recomputed segment; 0 means that nothing is recomputed.

    Args:
        checkpoint: "none", "full", "sqrt" or "every:K".
        depth: Layers that can be checkpointed.

    Raises:
        StrategyError: Anything else.
    """
    if checkpoint == "none":
        return 0
    if checkpoint == "full":
        return 1
    if checkpoint == "sqrt":
        return max(1, round(math.sqrt(depth)))
    head, colon, tail = checkpoint.partition(":")
    if head == "every" and colon and tail.isdecimal() and int(tail) >= 1:
        return int(tail)
    raise StrategyError(f"checkpoint must be none, full, sqrt or every:K with K at least 1, not {checkpoint!r}")
