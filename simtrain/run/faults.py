"""What goes wrong during a run: failures by kind of unit, slow devices, silent corruption, spot preemption, devices that join.

Units of a kind fail independently. Exponential lifetimes of `n` units are one Poisson process of rate `n / MTBF`; Weibull lifetimes are
drawn per unit and renewed at each failure (Weibull shape below 1: infant mortality; above 1: wear).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InputError
from simtrain.run.checks import above_zero, not_negative, share

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Units:
    """One kind of unit that can fail and what a failure takes away.

    Attributes:
        name: "device", "node", "link", "switch" or a name of one's own.
        count: How many there are.
        mtbf_h: Mean time between failures of one unit, in hours.
        devices_lost: Devices that are gone until the unit is repaired (0 for a failure that only needs a restart).
        repair_h: Hours until the devices are back.
        shape: Weibull shape of the lifetimes; 1 is exponential.
        new: Whether all units are new at the start. If not, they have been in service for long, and fail at `count / mtbf_h` from the
            first hour on; new ones of shape below 1 fail far more often at first.
    """

    name: str
    count: int
    mtbf_h: float
    devices_lost: int = 1
    repair_h: float = 0.0
    shape: float = 1.0
    new: bool = False

    def __post_init__(self) -> None:
        above_zero(self, "count", "mtbf_h", "shape")
        not_negative(self, "devices_lost", "repair_h")

    @property
    def rate_per_s(self) -> float:
        """Failures per second of all units together, in the long run."""
        return self.count / (self.mtbf_h * HOUR_S)

    def failures_s(self, rng: np.random.Generator) -> Iterator[float]:
        """Yields the times of failure of any unit, rising."""
        if self.shape == 1.0:
            now = 0.0
            while True:
                now += float(rng.exponential(1 / self.rate_per_s))
                yield now
        scale = self.mtbf_h * HOUR_S / math.gamma(1 + 1 / self.shape)
        ends = (scale * self._first_lives(rng)).tolist()
        heapq.heapify(ends)
        while True:
            now = ends[0]
            heapq.heapreplace(ends, now + scale * float(rng.weibull(self.shape)))
            yield now

    def _first_lives(self, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Lives left at the start, over the scale: whole ones if new, else those of a renewal process in equilibrium.

        A unit met at any moment is more likely in a long life: lives weighted by their length are `Gamma(1 + 1/c)^(1/c)`, of which a
        uniform part is left.
        """
        if self.new:
            return rng.weibull(self.shape, int(self.count))
        lives = rng.gamma(1 + 1 / self.shape, size=int(self.count)) ** (1 / self.shape)
        return np.asarray(lives * rng.random(int(self.count)), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class SlowFaults:
    """Devices that become slow without failing; every step waits for the slowest.

    Attributes:
        mtbf_h: Mean time between such faults of the whole job, in hours.
        factor: By which the computing of the device is slowed.
        detection_h: Hours until it is noticed and the device is replaced like a failed one (after a snapshot, so nothing is lost).
        repair_h: Hours until the device is back.
    """

    mtbf_h: float
    factor: float = 1.5
    detection_h: float = 1.0
    repair_h: float = 0.0

    def __post_init__(self) -> None:
        above_zero(self, "mtbf_h")
        not_negative(self, "detection_h", "repair_h")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise InputError(f"SlowFaults: factor must be 1 or more (it multiplies the time), not {self.factor!r}")


@dataclass(frozen=True, slots=True)
class SilentFaults:
    """Corruption that nobody sees at first: detected later, and undone by going back to a snapshot from before it.

    Attributes:
        mtbf_h: Mean time between such faults of the whole job, in hours.
        detection_h: Hours until it is noticed.
    """

    mtbf_h: float
    detection_h: float = 4.0

    def __post_init__(self) -> None:
        above_zero(self, "mtbf_h")
        not_negative(self, "detection_h")


@dataclass(frozen=True, slots=True)
class Preemption:
    """Spot devices that are taken back.

    Attributes:
        mtbf_h: Mean time between preemptions of the whole job, in hours.
        notice_s: Warning; if a snapshot fits into it, nothing is lost.
        devices: Taken each time.
        returns_h: Mean hours until as many are offered again (exponential).
    """

    mtbf_h: float
    notice_s: float = 30.0
    devices: int = 1
    returns_h: float = 1.0

    def __post_init__(self) -> None:
        above_zero(self, "mtbf_h", "devices", "returns_h")
        not_negative(self, "notice_s")


@dataclass(frozen=True, slots=True)
class Faults:
    """Everything that can go wrong. Rates are per unit, except `mtbf_h`, which is of the whole job.

    Attributes:
        mtbf_h: Mean hours between failures of the whole job, one device each; `None` for none.
        device_mtbf_h: Of one device; as `node_mtbf_h`, `link_mtbf_h` and `switch_mtbf_h`.
        node_mtbf_h: Of one node; takes its devices.
        link_mtbf_h: Of one network link (one per node); the run restarts, no device is lost.
        switch_mtbf_h: Of one leaf switch; takes the nodes behind it.
        nodes_per_switch: Nodes behind a leaf switch.
        shape: Weibull shape of all these lifetimes; 1 is exponential.
        new: Whether all units are new at the start; see `Units`.
        repair_h: Hours until what failed is back.
        cascade: Probability that a failing device takes its whole node (correlated faults).
        units: Further kinds of units.
        trace: Failures at given times: (hour, devices lost, hours of repair).
        joins: Devices that join: (hour, devices).
        slow: Slow devices.
        silent: Silent corruption.
        preemption: Spot preemption.
        detection_s: Seconds a failure hangs the job before it is noticed.
    """

    mtbf_h: float | None = None
    device_mtbf_h: float | None = None
    node_mtbf_h: float | None = None
    link_mtbf_h: float | None = None
    switch_mtbf_h: float | None = None
    nodes_per_switch: int = 16
    shape: float = 1.0
    new: bool = False
    repair_h: float = 0.0
    cascade: float = 0.0
    units: tuple[Units, ...] = ()
    trace: tuple[tuple[float, int, float], ...] = ()
    joins: tuple[tuple[float, int], ...] = ()
    slow: SlowFaults | None = None
    silent: SilentFaults | None = None
    preemption: Preemption | None = None
    detection_s: float = 0.0

    def __post_init__(self) -> None:
        above_zero(self, "mtbf_h", "device_mtbf_h", "node_mtbf_h", "link_mtbf_h", "switch_mtbf_h", "nodes_per_switch", "shape")
        not_negative(self, "repair_h", "detection_s")
        share(self, "cascade")
        for row in self.trace:
            if len(row) != 3 or not all(math.isfinite(v) and v >= 0 for v in row):
                raise InputError(f"Faults: a row of the trace is (hour, devices lost, hours of repair), all zero or more, not {row!r}")
        for pair in self.joins:
            if len(pair) != 2 or not (pair[0] >= 0 and pair[1] >= 1):
                raise InputError(f"Faults: a row of joins is (hour, devices), not {pair!r}")

    @property
    def any(self) -> bool:
        """Whether anything interrupts the run."""
        rates = (self.mtbf_h, self.device_mtbf_h, self.node_mtbf_h, self.link_mtbf_h, self.switch_mtbf_h)
        return any(r is not None for r in (*rates, self.slow, self.silent, self.preemption)) or bool(self.units or self.trace)

    def all_units(self, devices: int, devices_per_node: int) -> tuple[Units, ...]:
        """The kinds of units of a job on so many devices."""
        nodes = math.ceil(devices / devices_per_node)
        node_devices = min(devices, devices_per_node)
        switches = math.ceil(nodes / self.nodes_per_switch)
        rows = [
            ("job", 1, self.mtbf_h, 1),
            ("device", devices, self.device_mtbf_h, 1),
            ("node", nodes, self.node_mtbf_h, node_devices),
            ("link", nodes, self.link_mtbf_h, 0),
            ("switch", switches, self.switch_mtbf_h, min(devices, node_devices * self.nodes_per_switch)),
        ]
        stated = [Units(name, n, mtbf, lost, self.repair_h, self.shape, self.new) for name, n, mtbf, lost in rows if mtbf is not None]
        return (*stated, *self.units)

    def rate_per_s(self, devices: int, devices_per_node: int) -> float:
        """Interruptions per second in the long run: failures and preemptions; traces and silent faults not counted."""
        rate = sum(u.rate_per_s for u in self.all_units(devices, devices_per_node))
        return rate + (1 / (self.preemption.mtbf_h * HOUR_S) if self.preemption else 0.0)


def read_trace(path: str) -> tuple[tuple[float, int, float], ...]:
    """Reads a trace of failures from a CSV file with a header and the columns `hour`, `devices`, `repair_h`.

    Raises:
        InputError: The file cannot be read, lacks a column, or a value is no number (with its line).
    """
    import csv
    from pathlib import Path

    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = []
            for row in reader:
                try:
                    rows.append((float(row["hour"]), int(row["devices"]), float(row["repair_h"])))
                except (KeyError, TypeError, ValueError):
                    raise InputError(
                        f"{path}, line {reader.line_num}: expected numbers in the columns hour, devices and repair_h"
                    ) from None
    except OSError as error:
        raise InputError(f"cannot read the trace of failures {path}: {error.strerror}") from None
    return tuple(rows)
