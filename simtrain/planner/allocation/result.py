"""What an allocation returns: replicas, who runs what, how fast, how far from the bound, and what each device is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simtrain.core.result import MemoryReport, TraceEvent
from simtrain.core.units import format_bytes, format_time
from simtrain.planner.allocation.kinds import Carrier
from simtrain.planner.allocation.place import Placement

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Worth:
    """What a kind of device adds.

    Attributes:
        kind: Its name.
        devices: How many there are.
        used: How many the plan uses.
        share: Of the global batch that replicas with this kind process (a replica of several kinds counts by its devices' busy time).
        busy: Mean share of the step in which they compute.
        without_one_s: Step time of the best plan with one device fewer.
        without_all_s: Step time of the best plan without any; infinite where nothing is left.
        energy_j: Of a step, of the devices used.
        energy_saved_j: Energy of a step that the best plan without any would save (negative: it would take more).
        cost_usd: Of a step, of the devices used.
    """

    kind: str
    devices: int
    used: int
    share: float
    busy: float
    without_one_s: float
    without_all_s: float
    energy_j: float
    energy_saved_j: float
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The best allocation that was found.

    Attributes:
        workload: Name.
        cluster: Name.
        global_batch: Samples of a step.
        step_time_s: As `schedule` reads the allocation's program.
        bound_s: What no allocation can beat.
        placement: Replicas with their ranks.
        breakdown_s: Of the slowest stage; sums to the step time.
        synchronise_s: Reduction of gradients alone, and gathering of parameters where replicas share the optimizer's states.
        memory: Of every stage of every group of replicas.
        energy_j: Of a step, devices used and their hosts.
        cost_usd: Of a step, devices used.
        worth: What each kind adds; empty where that was not asked for.
        left_out: Devices that the plan leaves idle, by kind.
        carrier: What could carry it out.
        precisions: Recipe of each kind, for stages that name none.
        zero: 1 where replicas share the optimizer's states (ZeRO stage 1), else 0.
        templates: How many templates the search looked at.
        elapsed_s: How long it took.
        assumptions: What was assumed or left out, in words.
        events: One step, for timelines.
    """

    workload: str
    cluster: str
    global_batch: int
    step_time_s: float
    bound_s: float
    placement: Placement
    breakdown_s: Mapping[str, float]
    synchronise_s: float
    memory: tuple[MemoryReport, ...]
    energy_j: float
    cost_usd: float
    worth: tuple[Worth, ...]
    left_out: Mapping[str, int]
    carrier: Carrier
    precisions: Mapping[str, str]
    templates: int
    elapsed_s: float
    zero: int = 0
    assumptions: tuple[str, ...] = ()
    events: tuple[TraceEvent, ...] = field(default=(), repr=False)

    @property
    def samples_per_s(self) -> float:
        """Throughput."""
        return self.global_batch / self.step_time_s

    @property
    def fits(self) -> bool:
        """Whether every stage fits its devices, which a plan of one's own need not."""
        return all(m.fits for m in self.memory)

    @property
    def gap(self) -> float:
        """Share of the step time above the bound: nothing can be faster by more."""
        return 1 - self.bound_s / self.step_time_s

    def rows(self) -> list[dict[str, Any]]:
        """One row for each stage of each group of replicas."""
        made = []
        memory = iter(self.memory)
        for number, placed in enumerate(self.placement, start=1):
            share, template = placed.share, placed.share.template
            for s, stage in enumerate(template.stages):
                own = next(memory)
                made.append(
                    {
                        "group": number,
                        "copies": share.copies,
                        "stage": s,
                        "device": stage.unit.kind,
                        "devices": stage.unit.tensor * share.copies,
                        "tensor": stage.unit.tensor,
                        "sequence_parallel": stage.unit.sequence,
                        "first_layer": stage.start,
                        "layers": stage.end - stage.start,
                        "checkpoint": stage.unit.checkpoint,
                        "precision": stage.unit.precision or self.precisions[stage.unit.kind],
                        "micro_batch": template.micro_batch,
                        "micro_batches": share.micro_batches,
                        "batch_share": share.samples / self.global_batch,
                        "memory_bytes": own.device_bytes,
                        "memory_share": own.device_bytes / own.capacity_bytes,
                        "ranks": sorted(r for copy in placed.copies for r in copy[s]),
                    }
                )
        return made

    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def worth_frame(self) -> pd.DataFrame:
        """What each kind adds, as a table; times saved are those of a step."""
        import pandas as pd

        rows = [{name: getattr(w, name) for name in Worth.__dataclass_fields__} for w in self.worth]
        frame = pd.DataFrame(rows, columns=list(Worth.__dataclass_fields__))
        frame["one_saves_s"] = frame.without_one_s - self.step_time_s
        frame["all_save_s"] = frame.without_all_s - self.step_time_s
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON; timelines are left out."""
        plain = ("workload", "cluster", "global_batch", "fits", "step_time_s", "samples_per_s", "bound_s", "gap", "synchronise_s")
        more = ("energy_j", "cost_usd", "zero", "templates", "elapsed_s", "assumptions")
        data = {name: getattr(self, name) for name in (*plain, *more)}
        data["breakdown_s"], data["left_out"] = dict(self.breakdown_s), dict(self.left_out)
        data["executable"], data["carrier"] = self.carrier.executable, self.carrier.reason
        data["stages"] = self.rows()
        names = Worth.__dataclass_fields__
        data["worth"] = [{n: None if getattr(w, n) == float("inf") else getattr(w, n) for n in names} for w in self.worth]
        return data

    def __str__(self) -> str:
        lines = [
            f"{self.workload} on {self.cluster}, global batch {self.global_batch}: {format_time(self.step_time_s)} per step, "
            f"{self.samples_per_s:.4g} samples/s",
            f"no allocation is faster than {format_time(self.bound_s)} (gap {self.gap:.0%})",
            *(f"  {p.share.copies} x ({p.share.template}), {p.share.micro_batches} micro-batches each" for p in self.placement),
            *["  optimizer states shared by the replicas (ZeRO stage 1)"] * (self.zero > 0),
            *(f"  left out: {n} x {kind}" for kind, n in self.left_out.items() if n),
            f"{'executable' if self.carrier.executable else 'hypothetical'}: {self.carrier.reason}",
            f"memory at most {max(m.device_bytes / m.capacity_bytes for m in self.memory):.0%} of a device "
            f"({format_bytes(max(m.device_bytes for m in self.memory))})" + ", which DOES NOT FIT" * (not self.fits),
        ]
        return "\n".join(lines)
