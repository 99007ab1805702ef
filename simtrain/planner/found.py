"""What a search found: the plan with its ranking, its front and its failures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from simtrain.core.result import Result
from simtrain.planner.evidence import Nearby
from simtrain.planner.robust import Outlook
from simtrain.planner.why import Why


@dataclass(frozen=True, slots=True)
class Failure:
    """A combination that does not work, and why.

    Attributes:
        strategy: As text.
        reason: In words.
        over_bytes: By how much it exceeds the device's memory, at least (0 if that is not the reason).
        term: The memory kind that takes most ("" if that is not the reason).
        smallest_change: The fitting combination that differs in the fewest choices, as text ("" if there is none).
        smallest_change_samples_per_s: Its throughput.
        runtime: What would carry it out.
        times_limit: How many times a limit other than memory it takes (0 if that is not the reason).
    """

    strategy: str
    reason: str
    over_bytes: float = 0.0
    term: str = ""
    smallest_change: str = ""
    smallest_change_samples_per_s: float = 0.0
    runtime: str = ""
    times_limit: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the search found.

    Attributes:
        workload: Name.
        cluster: Name.
        global_batch: Samples per step (the first where several were allowed).
        objective: What was optimised (the first where there were several).
        considered: Combinations in the space; the sum of ranked, failed, unlisted and passed over.
        ranked: What fits and was read, best first.
        failed: What does not, nearest to fitting first.
        passed_over: Combinations that a bound or a projection of their step time showed to be no match for the best.
        unread: Combinations that were not looked at because the search took too long; above zero, the plan is not complete.
        front: With several objectives, what nothing else beats in all of them; else the best alone.
        unlisted: Combinations that memory does not suffice for either, by more than for those listed as failed.
        objectives: All of them.
        notes: How it was searched, in words.
        elapsed_s: How long it took.
        why: What bounds the best and what would change it, where that was asked for.
        advice: Where nothing fits, what would.
        evidence: The measured runs nearest to the best, and how far off predictions of them are.
        outlooks: The finalists under errors of the model, in the order of `ranked`, where a robust choice was asked for.
    """

    workload: str
    cluster: str
    global_batch: int
    objective: str
    considered: int
    ranked: tuple[Result, ...]
    failed: tuple[Failure, ...]
    passed_over: int = 0
    unread: int = 0
    front: tuple[Result, ...] = ()
    unlisted: int = 0
    objectives: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    elapsed_s: float = 0.0
    why: Why | None = None
    advice: tuple[str, ...] = ()
    evidence: tuple[Nearby, ...] = ()
    outlooks: tuple[Outlook, ...] = ()

    @property
    def best(self) -> Result | None:
        """The winner, or `None` if nothing fits."""
        return self.ranked[0] if self.ranked else None

    @property
    def by_runtime(self) -> dict[str, Result]:
        """The best under each runtime that something was read under, in the order of the ranking."""
        found: dict[str, Result] = {}
        for result in self.ranked:
            found.setdefault(result.runtime, result)
        return found

    @property
    def complete(self) -> bool:
        """Whether every combination was accounted for."""
        return self.unread == 0

    def report(self, path: Path | str) -> None:
        """Writes one HTML file about it that needs no network: `simtrain.report.write_page`.

        Raises:
            InputError: The file cannot be written, or does not end in .html.
        """
        import_module("simtrain.report").write_page(self, path)  # by name: planner stands below what people read

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        data: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["ranked"] = [r.to_dict() for r in self.ranked]
        data["front"] = [r.to_dict() for r in self.front]
        data["why"] = asdict(self.why) if self.why else None
        data["evidence"] = [n.to_dict() for n in self.evidence]
        data["outlooks"] = [o.to_dict() for o in self.outlooks]
        data["failed"] = [{name: getattr(f, name) for name in Failure.__dataclass_fields__} for f in self.failed]
        return data


__all__ = ["Failure", "Plan"]
