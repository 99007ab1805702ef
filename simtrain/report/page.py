"""One self-contained HTML file about a plan, a prediction or a comparison: readable offline, tables that sort, figures with hover."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from simtrain.core.errors import InputError
from simtrain.core.result import Result
from simtrain.core.units import format_bytes, format_time
from simtrain.planner import evidence
from simtrain.planner.found import Plan
from simtrain.report import page_figures as figures
from simtrain.report import page_tables as tables
from simtrain.report import page_words as words
from simtrain.report.page_figures import Axis, Figure
from simtrain.report.page_tables import Table

if TYPE_CHECKING:
    from simtrain.planner.why import Comparison

AXES = {
    "throughput": Axis("samples/s", lambda r: r.samples_per_s),
    "step_time": Axis("step time (s)", lambda r: r.step_time_s),
    "memory": Axis("memory of the fullest device (GiB)", lambda r: r.memory.device_bytes / 2**30),
    "energy": Axis("energy (J per sample)", lambda r: r.energy_j / r.global_batch),
    "cost": Axis("cost (USD per sample)", lambda r: r.cost_usd / r.global_batch),
    "tokens_per_dollar": Axis("tokens per USD", lambda r: r.tokens_per_s * r.step_time_s / r.cost_usd if r.cost_usd else 0.0),
}
"""What a plan can be drawn by; the balanced score depends on all strategies together and is not drawn."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        title: Of the part.
        sentences: Before anything else.
        figures: Each with its caption.
        tables: Each with its caption.
        items: A list at the end.
        folded: Whether it is closed until one opens it.
    """

    title: str
    sentences: tuple[str, ...] = ()
    figures: tuple[tuple[str, Figure], ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    items: tuple[str, ...] = ()
    folded: bool = False

    @property
    def anchor(self) -> str:
        """Name of the part in the page's address."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Page:
    """What a file says.

    Attributes:
        title: What is trained on what.
        question: What was asked, in a sentence.
        strategy: The answer as text for the command line ("" for none).
        tiles: The numbers that matter most: name, value, and what belongs to it.
        sentences: The answer in words, a paragraph each.
        warnings: What a reader must not miss.
        sections: The rest.
        runtime: What carries the answer out.
    """

    title: str
    question: str
    strategy: str
    tiles: tuple[tuple[str, str, str], ...]
    sentences: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    sections: tuple[Section, ...] = field(default=())
    runtime: str = ""


def write_page(subject: Result | Plan | Comparison, path: Path | str) -> None:
    """Writes a plan, a prediction or a comparison as one HTML file that needs nothing else, not even a network.

    Args:
        subject: What it is about.
        path: Where to; ends in .html.

    Raises:
        InputError: The file cannot be written, or does not end in .html.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target}: a report is an HTML file, give a name that ends in .html")
    try:
        target.write_text(page_html(subject), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None


def page_html(subject: Result | Plan | Comparison) -> str:
    """Returns the text of the page; see `write_page`."""
    from simtrain.report.page_render import render_page

    if isinstance(subject, Plan):
        return render_page(plan_page(subject))
    return render_page(_result_page(subject) if isinstance(subject, Result) else _comparison_page(subject))


def plan_page(plan: Plan) -> Page:
    """What is said of a plan."""
    batch = f"{plan.global_batch:,} samples a step" if plan.global_batch else "any batch"
    aims = " and ".join(plan.objectives) or plan.objective
    question = f"The best way to train {plan.workload} on {plan.cluster} with {batch}, by {aims}."
    warnings = () if plan.complete else (f"Not complete: {plan.unread:,} strategies were not looked at; a better one may be among them.",)
    rest = [_others(plan), _evidence_of(plan), Section("How it was searched", (words.search_in_words(plan),))]
    best = plan.best
    title = f"{plan.workload} on {plan.cluster}"
    if best is None:
        sentences = ("Nothing fits." if plan.complete else "Nothing fits of what was looked at.", *plan.advice)
        return Page(title, question, "", (), sentences, warnings, tuple(s for s in rest if s))
    sections = [_time(best), _memory(best), _alternatives(plan), _why(plan), *rest, _assumptions(best)]
    kept = tuple(s for s in sections if s)
    answer = _answer(best, words.runtimes_in_words(plan), words.second_best(plan))
    return Page(title, question, best.strategy, _tiles(best), answer, (*warnings, *_doubts(plan)), kept, best.runtime)


def _result_page(result: Result) -> Page:
    """What is said of one prediction."""
    question = f"One step of {result.workload} on {result.cluster} under {result.runtime}, read by {result.reader}."
    when = words.moment_in_words(result.memory.peak_moment)
    warnings = () if result.fits else (f"It does not fit: over by {format_bytes(result.memory.over_bytes)} {when}.",)
    sections = tuple(s for s in (_time(result), _memory(result), _assumptions(result)) if s)
    title = f"{result.workload} on {result.cluster}"
    return Page(title, question, result.strategy, _tiles(result), _answer(result), warnings, sections, result.runtime)


def _comparison_page(found: Comparison) -> Page:
    """What is said of two predictions beside each other."""
    named = (("A", found.a), ("B", found.b))
    time, memory = tables.differences(found)
    tiles = tuple(
        (f"{name}: {title}", value, beside)
        for name, r in named
        for title, value, beside in _tiles(r)
        if title in ("step", "throughput", "memory")
    )
    warnings = tuple(f"{name} does not fit: over by {format_bytes(r.memory.over_bytes)}." for name, r in named if not r.fits)
    sections = (
        Section("Where the time goes", (), (("", figures.breakdown(named)),), (("Time on the slowest rank", time),)),
        Section("Memory", (), (("", figures.memory(named)),), (("At the peak", memory),)),
        *(replace(s, title=f"{name}: {s.title}") for name, r in named for s in (_timeline_of(r), _assumptions(r)) if s),
    )
    title = found.a.workload if found.a.workload == found.b.workload else f"{found.a.workload} and {found.b.workload}"
    sentences = tuple(f"{name}: {r.strategy.replace(',', ', ')} on {r.cluster} under {r.runtime}." for name, r in named)
    return Page(f"{title}: A and B", str(found).splitlines()[2] + ".", "", tiles, sentences, warnings, sections)


def _answer(r: Result, *more: str) -> tuple[str, ...]:
    """The answer in words: how, then what comes of it."""
    paragraphs = (" ".join(words.strategy_in_words(r)), f"{words.verdict(r)} {words.money(r)}".strip(), *more)
    return tuple(p for p in paragraphs if p)


def _tiles(r: Result) -> tuple[tuple[str, str, str], ...]:
    memory = r.memory
    left = f"{format_bytes(-memory.over_bytes)} left" if memory.fits else f"{format_bytes(memory.over_bytes)} too much"
    tiles = [
        ("throughput", f"{words.number(r.tokens_per_s)}", f"tokens/s, {words.number(r.samples_per_s)} samples/s"),
        ("step", format_time(r.step_time_s), f"bound by {r.bound_by}"),
        ("MFU", f"{r.mfu:.1%}", f"{r.mfu_causal:.1%} of causal attention as computed"),
        ("memory", f"{memory.device_bytes / memory.capacity_bytes:.0%}", f"of {format_bytes(memory.capacity_bytes)}, {left}"),
        ("power", f"{words.number(r.power_w)} W", f"{words.number(r.energy_j / r.global_batch)} J per sample"),
    ]
    if r.cost_usd:
        tiles.append(("cost", f"{words.number(r.cost_usd / r.step_time_s * 3600)} USD/h", f"{words.number(r.cost_usd)} USD per step"))
    return tuple(tiles)


def _time(r: Result) -> Section:
    drawn = [("Every gap of the slowest rank is charged to what it waited for.", figures.breakdown([("step", r)]))]
    return Section("Where the time goes", (words.time_goes(r),), (*drawn, *figures.timelines(r)))


def _timeline_of(r: Result) -> Section | None:
    drawn = figures.timelines(r)
    return Section("timeline", (), tuple(drawn), folded=True) if drawn else None


def _memory(r: Result) -> Section:
    at = f"The fullest device is {r.memory.rank_class}; it is fullest {words.moment_in_words(r.memory.peak_moment)}."
    drawn = [("At the peak, by kind, against what a device has.", figures.memory([("peak", r)]))]
    over_time = figures.memory_over_time(r)
    if over_time:
        drawn.append(("What tensors occupy over the step, in the order in which the host issues operations.", over_time))
    return Section("Memory", (at,), tuple(drawn))


def _alternatives(plan: Plan) -> Section:
    drawable = [o for o in plan.objectives if o in AXES]
    aims = [AXES[o] for o in drawable[:2]] if len(drawable) > 1 else [AXES["memory"], AXES["throughput"]]
    caption = f"Every strategy that fits: {aims[1].title} against {aims[0].title}. Point at one to read it."
    drawn = figures.tradeoff(plan.ranked, tables.front(plan), aims)
    shared = tables.in_common(plan.ranked)
    said = f"All of them have {', '.join(shared)}." if shared else ""
    if len(plan.ranked) > tables.MOST_ROWS:
        said = f"The first {tables.MOST_ROWS} of {len(plan.ranked):,}. {said}"
    return Section("Alternatives", (), ((caption, drawn),), ((said, tables.alternatives(plan.ranked)),))


def _why(plan: Plan) -> Section | None:
    if plan.why is None:
        return None
    resources = [w for w in plan.why.resources if w.change.startswith("10 %")]
    devices = [f"{w.change} would add {w.gain:.1%}" for w in plan.why.resources if w not in resources]
    lead = f"The best is {plan.why.bound_by}. {'. '.join((*devices, 'What 10 % more of each resource would be worth, priced anew'))}:"
    drawn = (("", figures.sensitivity(resources)),) if resources else ()
    knobs = (("One other choice at a time", tables.worths(plan.why.knobs, "choice")),) if plan.why.knobs else ()
    return Section("What would change it", (lead,), drawn, knobs)


def _others(plan: Plan) -> Section | None:
    if not plan.failed:
        return None
    shown = f"{len(plan.failed):,} strategies do not fit or cannot be, by reason."
    return Section("Why the others fail", (shown,), (), (("", tables.failures(plan.failed)),))


def _evidence_of(plan: Plan) -> Section | None:
    if not plan.evidence:
        return None
    said = evidence.in_words(plan.evidence)
    how = "A distance of 1 is a factor of two in a size or degree, or one other choice. These runs are predicted anew with every plan."
    under = (("Finalists under errors of the model", tables.outlooks(plan.outlooks)),) if plan.outlooks else ()
    sources = tuple(dict.fromkeys(n.source for n in plan.evidence))
    return Section(
        "How sure", (f"{said[0].upper()}{said[1:]}.", how), (), (("Measured runs", tables.evidence(plan.evidence)), *under), sources
    )


def _doubts(plan: Plan) -> tuple[str, ...]:
    if plan.evidence and plan.evidence[0].distance > evidence.FAR:
        return (f"No measured run is near: {evidence.in_words(plan.evidence)}.",)
    return ()


def _assumptions(r: Result) -> Section | None:
    if not r.assumptions and not r.sources:
        return None
    listed = (*(f"Assumed: {a}" for a in r.assumptions), *(f"Rests on: {s}" for s in r.sources))
    return Section("Assumptions and sources", (), (), (), listed, folded=True)


def command_of(page: Page) -> str:
    """The strategy and what carries it out, quoted for a command line."""
    return f"--strategy {shlex.quote(page.strategy)} --runtime {shlex.quote(page.runtime)}"


__all__ = ["Page", "Section", "page_html", "write_page"]
