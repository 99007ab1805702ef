"""What all launchers share: the result of writing, and the arithmetic between batches and ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from simtrain.core.errors import InputError
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Job:
    """What a launcher must know beside the strategy.

    Attributes:
        per_node: Devices of a node.
        blocks: Blocks of the model that a pipeline cuts; 0 if that is not known, and then they are taken to divide evenly.
        runtime: What the strategy was planned with, where its behaviour is a choice of the launcher; `None` for the launcher's own.
    """

    per_node: int = 8
    blocks: int = 0
    runtime: Runtime | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A strategy in a launcher's form.

    Attributes:
        text: The form.
        unsaid: Fields of the strategy that it cannot say, with the reason.
    """

    text: str
    unsaid: Mapping[str, str]

    @property
    def left_out(self) -> tuple[str, ...]:
        """The fields that it cannot say, in words."""
        return tuple(f"{name}: {reason}" for name, reason in self.unsaid.items())


def beyond(strategy: Strategy, names: tuple[str, ...], launcher: str) -> dict[str, str]:
    """Names fields that a launcher has no word for, where they are not at their default."""
    default = {f.name: f.default for f in fields(Strategy)}
    return {
        name: f"{launcher} has no setting for {name}={getattr(strategy, name)}"
        for name in names
        if getattr(strategy, name) != default[name]
    }


def ranks_of(text: str, given: int | None, launcher: str) -> int:
    """Ranks in all, from the comment that `emit` writes or from the caller.

    Raises:
        InputError: Neither says.
    """
    found = re.search(r"^#.*\b(\d+) ranks", text, flags=re.M)
    if given is None and found is None:
        raise InputError(f"{launcher} takes the ranks from where it is started: say how many (ranks=64)")
    return given if given is not None else int(found.group(1)) if found else 0


def replicas(ranks: int, per_replica: int, launcher: str) -> int:
    """Data-parallel degree.

    Raises:
        InputError: The ranks do not divide.
    """
    if ranks % per_replica or ranks < per_replica:
        raise InputError(f"{launcher}: {ranks} ranks do not divide into replicas of {per_replica}")
    return ranks // per_replica


def accumulation_of(global_batch: int, micro_batch: int, data: int, launcher: str) -> int:
    """Micro-batches per replica and step.

    Raises:
        InputError: The batch does not divide.
    """
    if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * data):
        raise InputError(f"{launcher}: a global batch of {global_batch} is no multiple of micro-batch {micro_batch} x {data} replicas")
    return global_batch // (micro_batch * data)


def whole(value: Any, name: str, launcher: str) -> int:
    """A whole number of a configuration.

    Raises:
        InputError: It is none ("auto", say).
    """
    if isinstance(value, bool) or not isinstance(value, int):
        try:
            return int(str(value))
        except ValueError:
            raise InputError(f"{launcher}: {name} must be a whole number, not {value!r}") from None
    return value
