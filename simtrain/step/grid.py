"""Where ranks stand: which of them share a layer, a sequence or a part of the model."""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.core.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Grid:
    """Ranks in the order of Megatron-LM: tensor-parallel ranks are neighbours, then context, then data, then pipeline.

    Source: Megatron-LM, `core/parallel_state.py`, order "tp-cp-ep-dp-pp".

    Attributes:
        tensor: Ranks that share a layer.
        context: Ranks that share a sequence.
        data: Replicas.
        pipeline: Stages.
        expert: Ranks that share the experts, taken from data and context ranks.
    """

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int = 1

    @classmethod
    def of(cls, strategy: Strategy) -> Grid:
        """The grid of a strategy without an explicit plan."""
        return cls(strategy.tensor, strategy.context, strategy.data, strategy.pipeline, strategy.expert)

    @property
    def per_stage(self) -> int:
        """Ranks of a pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def holders(self) -> int:
        """Ranks that hold the same part of the model."""
        return self.context * self.data

    def rank(self, stage: int, holder: int = 0, tensor: int = 0) -> int:
        """The rank at a place; holders count context first, then data."""
        return (stage * self.holders + holder) * self.tensor + tensor

    def stage(self, stage: int) -> range:
        """All ranks of a stage."""
        return range(stage * self.per_stage, (stage + 1) * self.per_stage)

    def tensor_groups(self, stage: int) -> list[tuple[int, ...]]:
        """Ranks that share each layer."""
        own = self.stage(stage)
        return [tuple(own[first : first + self.tensor]) for first in range(0, len(own), self.tensor)]

    def context_groups(self, stage: int) -> list[tuple[int, ...]]:
        """Ranks that share each sequence."""
        return self._among_holders(stage, self.context)

    def expert_groups(self, stage: int) -> list[tuple[int, ...]]:
        """Ranks that share the experts."""
        return self._among_holders(stage, self.expert)

    def _among_holders(self, stage: int, size: int) -> list[tuple[int, ...]]:
        own, reach = self.stage(stage), size * self.tensor
        return [tuple(own[first + t : first + reach : self.tensor]) for first in range(0, len(own), reach) for t in range(self.tensor)]

    def holder_groups(self, stage: int, shard: int = 0) -> list[tuple[int, ...]]:
        """Ranks that hold the same part of the model, all or `shard` neighbours of them at a time."""
        return self._among_holders(stage, shard or self.holders)

    def expert_holder_groups(self, stage: int) -> list[tuple[int, ...]]:
        """Ranks that hold the same experts."""
        return self._across(stage, self.expert)

    def replica_groups(self, stage: int, shard: int) -> list[tuple[int, ...]]:
        """Ranks that hold the same shard, one in every sharding group."""
        return self._across(stage, shard)

    def _across(self, stage: int, size: int) -> list[tuple[int, ...]]:
        own = self.stage(stage)
        return [tuple(own[first :: size * self.tensor]) for first in range(size * self.tensor)]
