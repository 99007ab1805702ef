"""What a simulated run is asked and what it writes down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from simtrain.run.course import Course, Evaluation
from simtrain.run.faults import Faults
from simtrain.run.policies import Policy
from simtrain.run.run_result import PARTS, RunEvent
from simtrain.run.state_price import StatePrice


@dataclass(frozen=True, slots=True)
class RunQuestion:
    """A checked question: a course, and what may disturb it.

    Attributes:
        course: Stretches of steps.
        base: Price of the undisturbed state.
        faults: What goes wrong.
        policy: What is done about it.
        snapshot_interval_s: Training between snapshots (inf for none).
        snapshot_stall_s: How long training waits.
        snapshot_write_s: How long until it is safe.
        keep: Snapshots kept.
        evaluation: Between steps.
        slow_ratio: Step time with a slow device over that without.
        shrink: From devices available to a price, for elastic runs.
    """

    course: Course
    base: StatePrice
    faults: Faults
    policy: Policy
    snapshot_interval_s: float
    snapshot_stall_s: float
    snapshot_write_s: float
    keep: int
    evaluation: Evaluation | None
    slow_ratio: float
    shrink: Callable[[int], StatePrice | None] | None


@dataclass(slots=True)
class Snapshot:
    """A saved state: when it was begun, when it is safe, and what had been done."""

    begun_s: float
    safe_s: float
    step: float
    productive_s: float
    slowed_s: float


@dataclass(slots=True)
class Ledger:
    """What a simulated run has used."""

    split_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    working_j: float = 0.0
    standing_j: float = 0.0
    held_device_s: float = 0.0
    failures: int = 0
    snapshots: int = 0
    events: list[RunEvent] = field(default_factory=list)
    progress: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)])
