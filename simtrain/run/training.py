"""One run as a discrete-event simulation in SimPy, over hours and weeks: legs of training between snapshots, and what interrupts them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Generator
from itertools import accumulate
from typing import Any

import numpy as np
import simpy

from simtrain.core.errors import InputError
from simtrain.core.units import format_time
from simtrain.run.course import Stretch
from simtrain.run.faults import HOUR_S, Units
from simtrain.run.question import Ledger, RunQuestion, Snapshot
from simtrain.run.run_result import RunEvent
from simtrain.run.state_price import StatePrice

Steps = Generator[simpy.Event, Any, bool]
Life = Generator[simpy.Event, Any, None]

PATIENCE = 100.0  # a run that takes so many times its undisturbed time (and at least so many hours) is given up
_ALMOST = 1e-9  # of a step


def patience_s(ideal_s: float) -> float:
    """Returns how long a run that takes so long undisturbed may take before it is given up."""
    return PATIENCE * max(ideal_s, HOUR_S)


class Training:
    """A run being simulated.

    Args:
        question: What is simulated.
        seed: Of the random numbers.
    """

    def __init__(self, question: RunQuestion, seed: int) -> None:
        self.q = question
        self.env = simpy.Environment()
        self.ledger = Ledger()
        self.done = 0.0
        self._stretch, self._stretch_end = 0, float(question.course.stretches[0].steps)
        self._saved = [Snapshot(0.0, 0.0, 0.0, 0.0, 0.0)]
        self._next_evaluation = float(question.evaluation.every_steps) if question.evaluation else math.inf
        self._available = self._held = question.base.devices + question.policy.spares
        self._held_since = 0.0
        self._grown = False
        self._slow = False
        self._corrupt_s: float | None = None
        self._failed: list[tuple[str, float, int, float]] = []  # kind, when, devices, hours until they are back
        self._noticed = False
        self._cold = False
        self._woken = False
        self._saving = False
        self._steps_per_s, self._leg_began_s = 0.0, 0.0
        self._mood = "starting"
        self._running: StatePrice | None = None
        self._shrunk: dict[int, StatePrice | None] = {}
        self._rng = np.random.default_rng([seed, 0])
        self._seed = seed

    def run(self) -> Ledger:
        """Simulates until the last step is done.

        Raises:
            InputError: It makes no progress worth the name; the message names the rates.
        """
        self._trainer = self.env.process(self._live())
        self._start_faults()
        limit_s = patience_s(self.q.course.time_s)
        self.env.run(until=self._trainer | self.env.timeout(limit_s))
        if self._trainer.is_alive:
            total, failures = self.q.course.steps, self.ledger.failures
            restart_s = self.q.policy.restart_time_s(self.q.base.devices)
            raise InputError(
                f"the run does not get done: {self.done / total:.1%} of {total} steps after {limit_s / 86400:.3g} days, with {failures} "
                f"interruptions (one every {format_time(limit_s / max(failures, 1))}, where a restart takes {format_time(restart_s)}) and "
                f"{self._available} of {self.q.base.devices} devices at the end. Failures are too frequent for the snapshots, restarts and "
                "repairs given"
            )
        self._hold(0)
        if self._corrupt_s is not None:
            self._note("undetected", "finished with silent corruption that was not noticed in time")
        return self.ledger

    # ---- the life of the training process

    def _live(self) -> Life:
        while True:
            if self._failed:
                yield from self._fall()
            elif self.done >= self.q.course.steps:
                return
            elif (price := self._state()) is None:
                yield from self._spend(math.inf, "waiting")
            elif self._cold:
                yield from self._restart(price)
            elif self._running is not None and self._running is not price:
                yield from self._snapshot()  # a planned change of size: nothing is lost
                self._cold = not self._failed
            else:
                self._running = price
                yield from self._leg(price)

    def _leg(self, price: StatePrice) -> Steps:
        stretch = self.q.course.stretches[self._stretch]
        step_s = self._step_s(price, stretch)
        ratio = self.q.slow_ratio if self._slow else 1.0
        snapshot = self._saved[-1].step + max(1, round(self.q.snapshot_interval_s / step_s)) if self._takes_snapshots else math.inf
        stop = min(self._stretch_end, max(snapshot, self.done), self._next_evaluation)
        before_s = self._leg_began_s = self.env.now
        self._steps_per_s = 1 / (step_s * ratio)
        drawing = stretch.price if price is self.q.base else price
        complete = yield from self._spend((stop - self.done) * step_s * ratio, "productive", drawing)
        elapsed_s = self.env.now - before_s
        self.ledger.split_s["productive"] -= elapsed_s * (1 - 1 / ratio)
        self.ledger.split_s["slowed"] += elapsed_s * (1 - 1 / ratio)
        self.done = stop if complete else min(stop, self.done + elapsed_s / (step_s * ratio))
        if not complete:
            return False
        last = self.done >= self.q.course.steps - _ALMOST
        evaluation = self.q.evaluation
        if evaluation is not None and self.done >= self._next_evaluation - _ALMOST:
            if not (yield from self._spend(evaluation.duration_s, "evaluation", drawing)):
                return False
            self._next_evaluation += evaluation.every_steps
        if self.done >= snapshot - _ALMOST and not last and not (yield from self._snapshot()):
            return False
        if self.done >= self._stretch_end - _ALMOST and not last:
            self._enter(self._stretch + 1)
        return True

    def _step_s(self, price: StatePrice, stretch: Stretch) -> float:
        """Time of one step of the course in a state: another global batch needs more or fewer steps for the same samples."""
        if price is self.q.base:
            return stretch.price.step_time_s
        return (
            price.step_time_s * self.q.base.samples_per_step / price.samples_per_step * stretch.price.step_time_s / self.q.base.step_time_s
        )

    def _enter(self, stretch: int) -> None:
        self._stretch = stretch
        self._stretch_end = float(sum(s.steps for s in self.q.course.stretches[: stretch + 1]))

    @property
    def _takes_snapshots(self) -> bool:
        return math.isfinite(self.q.snapshot_interval_s)

    def _snapshot(self) -> Steps:
        begun_s, split = self.env.now, self.ledger.split_s
        complete = yield from self._spend(self.q.snapshot_stall_s, "snapshot")
        if complete:
            safe_s = begun_s + self.q.snapshot_write_s
            self._saved.append(Snapshot(begun_s, safe_s, self.done, split["productive"], split["slowed"]))
            while len(self._saved) > self.q.keep + 1 and self._saved[2].safe_s <= self.env.now:
                del self._saved[1]  # the first entry is the start, from which one can always begin again
            self.ledger.snapshots += 1
            self.ledger.progress.append((self.env.now, self.done))
        return complete

    def _restart(self, price: StatePrice) -> Steps:
        if (yield from self._spend(self.q.policy.restart_time_s(price.devices), "restart")):
            self._cold = False
            if self._running is not None and price.devices != self._running.devices:
                self._note("resize", f"goes on with {price.devices} devices")
            self._running = price
            self.ledger.progress.append((self.env.now, self.done))
        return True

    def _fall(self) -> Life:
        """Handles what has failed: roll back, hang until it is noticed, lose devices; the restart follows when there are enough."""
        failed, self._failed = self._failed, []
        kinds = {kind for kind, *_ in failed}
        first_s = min(when for _, when, _, _ in failed)
        saved = False
        if kinds <= {"slow", "preemption"} and self._in_time(kinds):
            self._saving = True
            saved = yield from self._snapshot()
            self._saving = False
            if saved:
                failed, self._failed = failed + self._failed, []
        if not saved:
            self._roll_back(first_s)
            if kinds - {"preemption", "silent"}:
                yield from self._spend(self.q.faults.detection_s, "detection")
        if "slow" in kinds:
            self._slow = False
        for kind, _, devices, hours in failed:
            self._lose(kind, devices, hours)
        self._cold = True

    def _in_time(self, kinds: set[str]) -> bool:
        notice_s = self.q.faults.preemption.notice_s if self.q.faults.preemption else 0.0
        return self._takes_snapshots and ("preemption" not in kinds or self.q.snapshot_write_s <= notice_s)

    def _roll_back(self, failed_s: float) -> None:
        split = self.ledger.split_s
        corrupt_s = self._corrupt_s if self._corrupt_s is not None and self._noticed else math.inf
        while len(self._saved) > 1 and (self._saved[-1].safe_s > failed_s or self._saved[-1].begun_s > corrupt_s):
            self._saved.pop()
        to = self._saved[-1]
        if self._corrupt_s is not None and to.begun_s <= self._corrupt_s:
            self._corrupt_s = None
        self._noticed = False
        split["recomputed"] += split["productive"] - to.productive_s + split["slowed"] - to.slowed_s
        split["productive"], split["slowed"], self.done = to.productive_s, to.slowed_s, to.step
        if self.q.evaluation:
            every = self.q.evaluation.every_steps
            self._next_evaluation = (self.done // every + 1) * every
        ends = list(accumulate(s.steps for s in self.q.course.stretches))
        self._enter(min(bisect_right(ends, self.done), len(ends) - 1))
        self.ledger.progress.append((self.env.now, self.done))

    def _spend(self, duration_s: float, part: str, price: StatePrice | None = None) -> Steps:
        """Lets time pass and books it; returns whether it passed undisturbed."""
        start_s = self.env.now
        self._mood = part
        try:
            yield self.env.event() if math.isinf(duration_s) else self.env.timeout(duration_s)
            complete = True
        except simpy.Interrupt:
            complete = self._woken = False
        elapsed_s = self.env.now - start_s
        self.ledger.split_s[part] += elapsed_s
        if price is not None:
            self.ledger.working_j += elapsed_s * price.power_w
        else:
            self.ledger.standing_j += elapsed_s * (self._running or self.q.base).idle_power_w
        return complete

    # ---- devices

    def _state(self) -> StatePrice | None:
        """Price of the state that the devices at hand allow; `None` if it has to wait."""
        devices, base = self._available, self.q.base
        if devices >= base.devices and not (self._grown and self.q.shrink):
            return base
        if self.q.shrink is None or devices < 1:
            return None
        if devices == base.devices:
            return base
        if devices not in self._shrunk:
            self._shrunk[devices] = self.q.shrink(devices)
        return self._shrunk[devices]

    def _lose(self, kind: str, devices: int, hours: float) -> None:
        devices = min(devices, self._available)
        if devices == 0 or hours == 0:
            return
        self._available -= devices
        if kind == "preemption":
            self._hold(-devices)
        self.env.process(self._return(kind, devices, hours))

    def _return(self, kind: str, devices: int, hours: float) -> Life:
        yield self.env.timeout(hours * HOUR_S)
        self._gain(devices, "repaired" if kind != "preemption" else "join", held=kind == "preemption")

    def _gain(self, devices: int, kind: str, *, held: bool) -> None:
        self._available += devices
        if held:
            self._hold(devices)
        self._note(kind, f"{devices} devices more, {self._available} at hand")
        if self._mood == "waiting" or (self.q.shrink is not None and self._mood == "productive"):
            self._wake()

    def _hold(self, change: int) -> None:
        self.ledger.held_device_s += self._held * (self.env.now - self._held_since)
        self._held, self._held_since = self._held + change, self.env.now

    # ---- what goes wrong

    def _start_faults(self) -> None:
        faults, base = self.q.faults, self.q.base
        for i, units in enumerate(faults.all_units(base.devices, base.devices_per_node)):
            self.env.process(self._failures(units, np.random.default_rng([self._seed, 1, i])))
        for hour, devices, repair_h in faults.trace:
            self.env.process(self._traced(hour, devices, repair_h))
        for hour, devices in faults.joins:
            self.env.process(self._joining(hour, devices))
        for rare, source in ((faults.slow, self._slow_fault), (faults.silent, self._silent_fault), (faults.preemption, self._preempted)):
            if rare is not None:
                self.env.process(self._every(rare.mtbf_h, source))

    def _failures(self, units: Units, rng: np.random.Generator) -> Life:
        cascade, per_node = self.q.faults.cascade, self.q.base.devices_per_node
        for at_s in units.failures_s(rng):
            yield self.env.timeout(at_s - self.env.now)
            whole_node = cascade > 0 and units.devices_lost == 1 and rng.random() < cascade
            self._strike("failure", units.name, per_node if whole_node else units.devices_lost, units.repair_h)

    def _traced(self, hour: float, devices: int, repair_h: float) -> Life:
        yield self.env.timeout(hour * HOUR_S)
        self._strike("failure", "from the trace", devices, repair_h)

    def _joining(self, hour: float, devices: int) -> Life:
        yield self.env.timeout(hour * HOUR_S)
        self._grown = True
        self._gain(devices, "join", held=True)

    def _every(self, mtbf_h: float, source: Callable[[], Life]) -> Life:
        while True:
            yield self.env.timeout(float(self._rng.exponential(mtbf_h * HOUR_S)))
            self.env.process(source())

    def _slow_fault(self) -> Life:
        slow = self.q.faults.slow
        if slow is None or self._slow:
            return
        self._slow = True
        self._note("slow", f"a device computes {slow.factor:g} times slower")
        if self._mood == "productive":
            self._wake()
        yield self.env.timeout(slow.detection_h * HOUR_S)
        if self._slow:
            self._strike("slow", "slow device replaced", 1, slow.repair_h)

    def _silent_fault(self) -> Life:
        silent = self.q.faults.silent
        if silent is None or self._corrupt_s is not None:
            return
        at_s = self._corrupt_s = self.env.now
        self._note("silent", "silent corruption")
        yield self.env.timeout(silent.detection_h * HOUR_S)
        if self._corrupt_s == at_s:
            self._noticed = True
            self._strike("silent", f"corruption of {silent.detection_h:g} h ago noticed", 0, 0.0)

    def _preempted(self) -> Life:
        preemption = self.q.faults.preemption
        if preemption is not None:
            hours = float(self._rng.exponential(preemption.returns_h))
            self._strike("preemption", f"{preemption.devices} devices taken back", preemption.devices, hours)
        return
        yield

    def _strike(self, kind: str, what: str, devices: int, hours: float) -> None:
        """Something ends the training as it goes. While it hangs or waits already, only devices are lost."""
        self.ledger.failures += 1
        self._note(kind, f"{what}{f': {devices} devices' if devices else ''}")
        idle = self._mood in ("waiting", "detection") and kind != "silent"
        if idle or not self._trainer.is_alive:
            self._lose(kind, devices, hours)
            return
        self._failed.append((kind, self.env.now, devices, hours))
        if not (self._saving and kind == "preemption"):  # its notice lets the snapshot under way be finished
            self._wake()

    def _wake(self) -> None:
        if self._trainer.is_alive and not self._woken:
            self._woken = True
            self._trainer.interrupt()

    def _note(self, kind: str, what: str) -> None:
        since = (self.env.now - self._leg_began_s) * self._steps_per_s if self._mood == "productive" else 0.0
        self.ledger.events.append(RunEvent(self.env.now, kind, what, self.done + since))
