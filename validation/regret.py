"""Would one have chosen well? Regret over all groups of measured configurations that share model, machines and global batch.

Beside every regret stand those of nulls that know less: a choice by chance, one MFU per device and arithmetic (whose times are the same
for all alternatives of a group, so that it chooses by chance too), and a habit: the least division of the model, then the least
recomputation, then the largest micro-batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import log
from statistics import pstdev
from typing import TYPE_CHECKING, Any

from validation.layout_rows import LayoutRow
from validation.layouts import LAYOUT_SETS, load_layouts
from validation.report import LayoutComparison, Predictor, compare_layouts, predict_layout
from validation.statistics import Choice, RegretSummary, interval_of_mean, regret

if TYPE_CHECKING:
    from rich.console import RenderableType

OWN = "own PyTorch runs"
TARGET_PUBLISHED, TARGET_OWN, TARGET_OF_NULL = 0.05, 0.02, 0.5
"""Aims: mean regret over published groups, over own runs, and as a share of that by chance."""

_RECOMPUTED = ("none", "selective")


@dataclass(frozen=True, slots=True)
class Group:
    """Alternatives of one decision.

    Attributes:
        source: Where they were measured.
        name: Model, devices and batch.
        names: Of the alternatives.
        choice: What is predicted and measured.
        null: The same with the time by one MFU per device and arithmetic in place of the prediction.
        habit: The same with the order of the habit in place of the prediction.
        refused: Measured alternatives that are not modelled and therefore no part of the choice.
    """

    source: str
    name: str
    names: tuple[str, ...]
    choice: Choice
    null: Choice
    habit: Choice
    refused: int = 0

    @property
    def spread(self) -> float:
        """Standard deviation of log(predicted / measured) among the alternatives: what blurs a choice; a common error does not."""
        return pstdev(log(p / m) for p, m in zip(self.choice.predicted, self.choice.measured, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        rows = zip(self.names, self.choice.predicted, self.choice.measured, strict=True)
        return {
            "source": self.source,
            "group": self.name,
            "regret": self.choice.regret,
            "by_chance": self.choice.random_regret,
            "one_mfu": self.null.regret,
            "habit": self.habit.regret,
            "spread": self.spread,
            "refused": self.refused,
            "alternatives": [{"name": n, "predicted_s": p, "measured_s": m} for n, p, m in rows],
        }


@dataclass(frozen=True, slots=True)
class Line:
    """Groups of one source, or of several, together.

    Attributes:
        name: Of the source.
        summary: Of the prediction's choices.
        one_mfu: Mean regret of one MFU per device.
        habit: Mean regret of the habit.
        spread: Root mean square of the groups' spreads.
        interval: 90 % bootstrap interval of the mean regret, drawing groups; `None` with fewer than three.
    """

    name: str
    summary: RegretSummary
    one_mfu: float
    habit: float
    spread: float
    interval: tuple[float, float] | None

    @property
    def of_chance(self) -> float:
        """Mean regret as a share of that by chance."""
        return self.summary.mean / self.summary.random if self.summary.random else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        rest = {name: getattr(self, name) for name in ("one_mfu", "habit", "spread", "of_chance")}
        return {"name": self.name} | self.summary.to_dict() | rest | {"interval_90": self.interval}


def groups(predict: Predictor = predict_layout, sources: Sequence[str] = LAYOUT_SETS) -> tuple[Group, ...]:
    """Predicts all measured layouts and groups them by what a decision holds fixed; own runs follow.

    Alternatives that the prediction refuses are no part of a choice; a group needs two that are left.

    Args:
        predict: How a row is predicted.
        sources: Published sources.
    """
    found: list[Group] = []
    for name in sources:
        dataset = load_layouts(name)
        if dataset.evidence != "measured":
            continue
        table: dict[tuple[Any, ...], dict[Any, list[LayoutComparison]]] = {}
        report = compare_layouts(dataset, predict)
        refused = Counter(dataset.choice(r.row) for r in report.refused if r.row.outcome == "ok")
        for row in report.timed:
            table.setdefault(dataset.choice(row.row), {}).setdefault(row.row.layout, []).append(row)
        found += [
            _group(name, dataset.label(next(iter(alternatives.values()))[0].row), alternatives, refused[key])
            for key, alternatives in table.items()
            if len(alternatives) > 1
        ]
    return (*found, *own_groups())


def _group(source: str, name: str, alternatives: Mapping[Any, Sequence[LayoutComparison]], refused: int) -> Group:
    listed = list(alternatives.values())
    measured = tuple(_mean([r.measured_s or 0.0 for r in rows]) for rows in listed)
    predicted = tuple(_mean([r.prediction.step_time_s for r in rows]) for rows in listed)
    nulls = tuple(_mean([r.null_s or 0.0 for r in rows]) for rows in listed)
    order = sorted({habit_of(rows[0].row) for rows in listed})
    habits = tuple(1.0 + order.index(habit_of(rows[0].row)) for rows in listed)
    names = tuple(_layout_name(rows[0].row) for rows in listed)
    kinds = (Choice(predicted, measured), Choice(nulls, measured), Choice(habits, measured))
    return Group(source, name.partition(" b")[0] + f" b{listed[0][0].row.global_batch}", names, *kinds, refused)


def habit_of(row: LayoutRow) -> tuple[int, int, int]:
    """Sorts layouts as people do who do not compute: the least comes first."""
    recomputed = _RECOMPUTED.index(row.checkpoint) if row.checkpoint in _RECOMPUTED else len(_RECOMPUTED)
    return (row.tensor * row.pipeline * row.context, recomputed, -row.micro_batch)


def own_groups() -> tuple[Group, ...]:
    """Decisions measured with PyTorch here, predicted before they were measured (`validation.decisions`)."""
    found = []
    folder = files("validation") / "measured"
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if not path.name.startswith("decisions_") or path.name.startswith("decisions_predicted"):
            continue
        for group in json.loads(path.read_text(encoding="utf-8"))["groups"]:
            measured = tuple(group["measured_time_s"])
            same = Choice((1.0,) * len(measured), measured)
            habit = Choice(tuple(1.0 + i for i in range(len(measured))), measured)  # the first is the rule of thumb, see decisions
            choice = Choice(tuple(group["predicted_time_s"]), measured)
            found.append(Group(OWN, group["group"], tuple(group["names"]), choice, same, habit))
    return tuple(found)


def lines(found: Sequence[Group]) -> tuple[Line, ...]:
    """One line for each source, then published ones together."""
    sources = dict.fromkeys(g.source for g in found)
    listed = [_line(source, [g for g in found if g.source == source]) for source in sources]
    published = [g for g in found if g.source != OWN]
    if len({g.source for g in published}) > 1:
        listed.append(_line("published, together", published))
    return tuple(listed)


def _line(name: str, found: Sequence[Group]) -> Line:
    summary = regret([g.choice for g in found])
    nulls, habits = regret([g.null for g in found]), regret([g.habit for g in found])
    if summary is None or nulls is None or habits is None:
        raise ValueError(f"{name}: no groups")
    interval = interval_of_mean([g.choice.regret for g in found], [g.name for g in found])
    return Line(name, summary, nulls.mean, habits.mean, _mean([g.spread**2 for g in found]) ** 0.5, interval)


def regret_tables(found: Sequence[Group], *, worst: int = 5) -> list[RenderableType]:
    """Regret by source beside the nulls, and the choices that cost most.

    Args:
        found: All groups.
        worst: How many choices to list.
    """
    from simtrain.report.text import bullets, plain_table

    columns = ("groups", "best found", "mean regret", "90 % interval", "worst", "by chance", "one MFU", "habit", "pairs in order", "spread")
    table = plain_table("Choosing among measured configurations of one model, machine and batch", "source", *columns, numeric=columns)
    for line in lines(found):
        s = line.summary
        interval = f"{line.interval[0]:.1%} to {line.interval[1]:.1%}" if line.interval else "-"
        cells = [f"{v:.1%}" for v in (s.worst, s.random, line.one_mfu, line.habit, s.pairwise, line.spread)]
        table.add_row(line.name, str(s.choices), f"{s.best_found:.0%}", f"{s.mean:.2%}", interval, *cells)
    costly = plain_table(
        "Choices that cost most", "source", "group", "picked", "fastest", "regret", "by chance", numeric=("regret", "by chance")
    )
    for g in sorted(found, key=lambda g: -g.choice.regret)[:worst]:
        if g.choice.regret > 0:
            picked = g.names[g.choice.predicted.index(min(g.choice.predicted))]
            fastest = g.names[g.choice.measured.index(min(g.choice.measured))]
            costly.add_row(g.source, g.name, picked, fastest, f"{g.choice.regret:.1%}", f"{g.choice.random_regret:.1%}")
    refused = sum(g.refused for g in found)
    left_out = [f"{refused} measured alternatives of these groups are not modelled and no part of the choices"] if refused else []
    return [table, costly, bullets("Aims", verdicts(found)), bullets("Left out", left_out)]


def verdicts(found: Sequence[Group]) -> list[str]:
    """Says of each aim whether it is met."""
    said = []
    by_name = {line.name: line for line in lines(found)}
    for name, target in (("published, together", TARGET_PUBLISHED), (OWN, TARGET_OWN)):
        if name in by_name:
            line = by_name[name]
            for what, value, aim in (
                ("mean regret", line.summary.mean, target),
                ("share of that by chance", line.of_chance, TARGET_OF_NULL),
            ):
                said.append(f"{name}: {what} {value:.2%}, aim below {aim:.0%}: {'met' if value < aim else 'MISSED'}")
    return said


def to_dict(found: Sequence[Group]) -> dict[str, Any]:
    """Returns plain data for JSON."""
    return {"lines": [line.to_dict() for line in lines(found)], "aims": verdicts(found), "groups": [g.to_dict() for g in found]}


def _layout_name(row: LayoutRow) -> str:
    degrees = (("data", row.data), ("tensor", row.tensor), ("pipeline", row.pipeline), ("context", row.context), ("chunks", row.chunks))
    parts = [f"{name}={degree}" for name, degree in degrees if degree > 1]
    parts += [f"zero={row.zero}"] if row.zero else []
    parts += [f"checkpoint={row.checkpoint}"] if row.checkpoint != "none" else []
    return ",".join((*parts, f"micro_batch={row.micro_batch}"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
