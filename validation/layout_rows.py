"""One published run over a layout, and where it ran."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from simtrain.core.strategy import Strategy

_STRATEGY_FIELDS = (
    "data",
    "micro_batch",
    "accumulation",
    "precision",
    "optimizer",
    "checkpoint",
    "zero",
    "tensor",
    "pipeline",
    "context",
    "sequence_parallel",
    "expert",
    "chunks",
    "shard",
    "cuts",
    "offload",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where rows of a source ran.

    Attributes:
        device: Catalog name.
        node: Cluster of the catalog that is one node of it.
        per_node: Devices in a node; fewer devices than these are taken as so many devices of one node.
    """

    device: str
    node: str
    per_node: int

    def cluster(self, devices: int) -> str:
        """Returns the text of a cluster of so many devices; of less than a node, the text of the node."""
        whole, rest = divmod(devices, self.per_node)
        return f"{devices}x {self.device}" if whole and rest else f"{max(1, whole)}x {self.node}"


@dataclass(frozen=True, slots=True)
class LayoutRow:
    """One measured run, in the terms of a strategy.

    Attributes:
        model: Key of the source's models.
        machine: Key of the source's machines.
        devices: How many.
        sequence: Tokens per sample.
        global_batch: Samples per step.
        micro_batch: Samples per forward pass of a replica.
        data: Data-parallel degree.
        tensor: Tensor-parallel degree.
        pipeline: Pipeline stages.
        context: Context-parallel degree.
        expert: Expert-parallel degree.
        chunks: Model chunks per stage under interleaving.
        zero: ZeRO stage.
        shard: Size of the sharding group; 0 for all of a data-parallel group.
        sequence_parallel: Whether what tensor parallelism replicates is sharded by tokens.
        checkpoint: Activation checkpointing.
        precision: Recipe.
        optimizer: Of `Strategy`.
        cuts: Blocks of each chunk where they are not even.
        offload: What leaves the device between its uses.
        fused_attention: Where rows of one source differ; `None` for the source's.
        runtime: Framework preset where it differs from the source's.
        step_time_s: As printed; `None` where throughput is.
        tokens_per_s: Over all devices, as printed.
        samples_per_s: Over all devices, as printed.
        hardware_tflops: TFLOP/s per device with the recomputed forward pass counted, where the source prints nothing else.
        reported_tflops: TFLOP/s per device that the source prints beside a time or throughput.
        reported_mfu: The same as a share of the peak.
        memory_printed: Peak memory in the source's unit.
        steady_printed: What stays allocated after a step, in the source's unit.
        outcome: "ok", or "oom" for a run that ran out of memory.
        recalled: Whether the figure is from memory of the source, not looked up.
        doubt: What the source leaves open that decides the figure ("" for nothing).
        where: Place in the source.
    """

    model: str
    machine: str
    devices: int
    sequence: int
    global_batch: int
    micro_batch: int
    data: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    chunks: int = 1
    zero: int = 0
    shard: int = 0
    sequence_parallel: bool = False
    checkpoint: str = "none"
    precision: str = "bf16"
    optimizer: str = "adamw"
    cuts: str = ""
    offload: str = "none"
    fused_attention: bool | None = None
    runtime: str = ""
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    samples_per_s: float | None = None
    hardware_tflops: float | None = None
    reported_tflops: float | None = None
    reported_mfu: float | None = None
    memory_printed: float | None = None
    steady_printed: float | None = None
    outcome: Literal["ok", "oom"] = "ok"
    recalled: bool = False
    doubt: str = ""
    where: str = ""

    @property
    def accumulation(self) -> int:
        """Micro-batches per replica and step."""
        return self.global_batch // (self.data * self.micro_batch)

    @property
    def layout(self) -> tuple[int | str | bool, ...]:
        """What was chosen, for grouping: two rows with the same are one alternative measured twice."""
        return (self.runtime, *(getattr(self, name) for name in _STRATEGY_FIELDS))

    def strategy(self) -> Strategy:
        """Returns the row as a strategy; what equals a default of `Strategy` is left to it.

        Raises:
            StrategyError: A choice that `Strategy` has no field for.
            UnknownNameError: A recipe or schedule that is not modelled.
        """
        known = {f.name: f.default for f in fields(Strategy)}
        defaults = _ROW_DEFAULTS | known
        chosen = {name: value for name in _STRATEGY_FIELDS if (value := getattr(self, name)) != defaults[name]}
        if self.pipeline > 1:
            chosen["schedule"] = "interleaved" if self.chunks > 1 else "1f1b"
        return Strategy.from_dict(chosen)


_ROW_DEFAULTS: dict[str, Any] = {"sequence_parallel": False, "chunks": 1, "shard": 0}
