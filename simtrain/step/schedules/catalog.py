"""Schedules by name: those of simtrain, those of entry point group `simtrain.schedules`, and those registered at run time.

An entry point names a function without arguments that returns a mapping from name to `Schedule`.
"""

from __future__ import annotations

from simtrain.core import catalog
from simtrain.core.errors import StrategyError, UnknownNameError, fold
from simtrain.step.schedules.breadth_first import BreadthFirst
from simtrain.step.schedules.dual_pipe import DualPipe
from simtrain.step.schedules.gpipe import GPipe
from simtrain.step.schedules.interleaved import Interleaved
from simtrain.step.schedules.language import Schedule
from simtrain.step.schedules.one_f_one_b import OneForwardOneBackward
from simtrain.step.schedules.zero_bubble import H1, H2

_OWN: tuple[Schedule, ...] = (GPipe(), OneForwardOneBackward(), Interleaved(), BreadthFirst(), H1, H2, DualPipe())
_registered: dict[str, Schedule] = {}


def register(schedule: Schedule) -> Schedule:
    """Adds a schedule to the catalog of this process and returns it.

    Raises:
        StrategyError: Another schedule has the name.
    """
    known = {fold(name): name for name in names()}
    taken = known.get(fold(schedule.name))
    if taken is not None and find(taken) != schedule:
        raise StrategyError(f"there is a schedule {taken!r} already: give yours another name than {schedule.name!r}")
    _registered[schedule.name] = schedule
    return schedule


def names() -> tuple[str, ...]:
    """Names of all schedules."""
    return tuple(dict.fromkeys((*(s.name for s in _OWN), *catalog.names("schedules"), *_registered)))


def find(name: str) -> Schedule:
    """Looks a schedule up; case, spaces and hyphens do not matter.

    Raises:
        UnknownNameError: With the nearest names.
    """
    for schedule in (*_OWN, *_registered.values()):
        if fold(schedule.name) == fold(name):
            return schedule
    if fold(name) in map(fold, catalog.names("schedules")):
        found: Schedule = catalog.find("schedules", name)
        return found
    raise UnknownNameError("schedule", name, names())
