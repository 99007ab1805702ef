"""What a run does when devices are lost: wait for repair, take spares, or go on with fewer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.run.checks import not_negative

KINDS = ("restart", "spares", "elastic")

Planner = Callable[[int], Any]
"""From devices left to a strategy (or a price) for at most so many, or `None` if there is none."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a run survives.

    Attributes:
        kind: "restart" (wait until what failed is repaired), "spares" (take a spare, wait if there is none) or "elastic" (go on with the
            devices left, as `planner` says, and grow again when devices come back).
        spares: Devices kept ready; powered and paid.
        restart_s: Seconds to load the snapshot and begin again.
        restart_s_per_device: Seconds added for every device of the job (start-up grows with size).
        planner: For "elastic".
    """

    kind: Literal["restart", "spares", "elastic"] = "restart"
    spares: int = 0
    restart_s: float = 300.0
    restart_s_per_device: float = 0.0
    planner: Planner | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("policy", str(self.kind), KINDS)
        not_negative(self, "spares", "restart_s", "restart_s_per_device")
        if self.kind == "elastic" and self.planner is None:
            raise InputError("policy 'elastic' needs a planner: a function from the number of devices left to a strategy or None")
        if self.kind == "spares" and self.spares < 1:
            raise InputError("policy 'spares' needs at least one spare device: Policy('spares', spares=8)")
        if self.kind == "restart" and self.spares:
            raise InputError("policy 'restart' uses no spares: take Policy('spares', spares=...)")

    def restart_time_s(self, devices: int) -> float:
        """Seconds of a restart on so many devices."""
        return self.restart_s + self.restart_s_per_device * devices
