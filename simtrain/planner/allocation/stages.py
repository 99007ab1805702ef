"""Stages as the engine sees them: the setting and the lane of a range of layers on a unit of devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simtrain.core.checkpoint import inside_blocks
from simtrain.core.hardware import Cluster
from simtrain.core.precision import precision
from simtrain.core.program import RankClass
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.cost.fabric import Fabric
from simtrain.planner.allocation.kinds import Kind
from simtrain.planner.allocation.prices import Unit
from simtrain.step.costs import Place
from simtrain.step.layout import Lane
from simtrain.step.mixed import split_formats
from simtrain.step.narrow_check import settle
from simtrain.step.network import Wire, place
from simtrain.step.setting import Setting
from simtrain.step.shard import Chunk, chunks, rank_form
from simtrain.step.slowest import slowdown

Cuts = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is allocated where.

    Attributes:
        workload: What is trained.
        cluster: On what.
        fabric: Its routes.
        kinds: Kinds of devices, by name.
        optimizer: Which one.
        zero: 1 where replicas share the optimizer's states (ZeRO stage 1), else 0.
    """

    workload: Workload
    cluster: Cluster
    fabric: Fabric
    kinds: Mapping[str, Kind]
    optimizer: str
    zero: int = 0

    def setting(self, unit: Unit, micro_batch: int, micro_batches: int, stages: int, replicas: int) -> Setting:
        """The setting of a stage, as if the whole job were like it."""
        kind = self.kinds[unit.kind]
        recipe = unit.precision or kind.precision
        strategy = Strategy(
            data=replicas,
            micro_batch=micro_batch,
            accumulation=micro_batches,
            precision=recipe,
            optimizer=self.optimizer,
            checkpoint=unit.checkpoint,
            zero=self.zero,
            tensor=unit.tensor,
            sequence_parallel=unit.sequence,
            pipeline=stages,
        )
        devices = (kind.device,) * unit.tensor
        formats = settle(precision(recipe), self.workload, strategy, devices, kind.runtime)
        return Setting(self.workload, self.cluster, strategy, formats, kind.runtime, devices)

    def pieces(self, setting: Setting, cuts: Cuts) -> tuple[Chunk, ...]:
        """The layers of every stage, as a rank of this setting runs them."""
        local = split_formats(rank_form(self.workload, setting.strategy, setting.runtime, setting.devices), setting.precision)
        return chunks(local, cuts, setting.precision, setting.runtime, selective=inside_blocks(setting.strategy.checkpoint))

    def lane(
        self,
        setting: Setting,
        piece: Chunk,
        groups: Sequence[tuple[int, ...]],
        *,
        index: int = 0,
        stage: int = 0,
        name: str = "",
        alike: int = 0,
    ) -> Lane:
        """The lane of a stage.

        Args:
            setting: Of the stage.
            piece: What it holds.
            groups: Tensor-parallel ranks of every copy.
            index: Among all lanes.
            stage: Among those of its replica.
            name: For reports.
            alike: How many devices wait for the slowest of them; by default all of the groups.
        """
        wire = Wire(self.fabric, {"tensor": place(self.fabric, groups)} if setting.strategy.tensor > 1 else {})
        device = setting.devices[0]
        ranks = tuple(sorted(r for group in groups for r in group))
        slower = slowdown(device, alike or len(ranks))
        at = Place(device, setting.strategy.micro_batch, piece.workload.sequence, setting.runtime, wire, slower)
        return Lane(index, RankClass(name, ranks, device), stage, 0, at, (piece,))
