"""Tables of held-out fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simtrain.report.text import bullets, plain_table
from validation.errors import percent
from validation.fit_report import FitReport, FittedForm

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def fit_tables(report: FitReport) -> list[RenderableType]:
    """Returns errors by source, grouping and form, what choosing by them costs, and the constants of each form."""
    tables: list[RenderableType] = [_errors(form) for form in report.forms]
    chosen = _decisions(report)
    tables += [*([chosen] if chosen.row_count else []), *(_constants(form) for form in report.forms if form.fit)]
    stamp = ", ".join(f"{key} {value}" for key, value in report.provenance.items())
    notes = [
        "Every group is predicted with constants fitted to all other groups, those of other sources included; sources count alike.",
        "The null knows FLOPs and one constant per device and arithmetic path of the source, its group left out.",
        f"{len(report.forms)} forms on the same rows; errors between forms are no reason to trust the best of them.",
        *(f"{name}: {count} rows refused" for name, count in report.refused.items() if count),
        *(f"{f.name}: constants were found on a table that is {f.deviation:.2%} off the engine on average" for f in report.forms if f.fit),
        stamp,
    ]
    return [*tables, bullets("", notes)]


def _errors(form: FittedForm) -> Table:
    columns = ("rows", "groups", "null", "skill", "median", "mean", "90 % interval", "p90", "worst", "bias", "in sample", "variants")
    title = f"{form.name}: step times, every group left out"
    table = plain_table(title if form.fit else f"{form.name}: step times, nothing fitted", "source", "left out", *columns, numeric=columns)
    for s in form.sources:
        low_high = f"{s.interval[0]:.1%} to {s.interval[1]:.1%}" if s.interval else "-"
        cells = [percent(s.errors, name) for name in ("median", "mean", "p90", "worst", "bias")]
        table.add_row(
            s.source,
            " + ".join(s.by),
            str(s.errors.count),
            str(s.groups),
            percent(s.null, "mean"),
            "-" if s.skill is None else f"{s.skill:.2f}",
            *cells[:2],
            low_high,
            *cells[2:],
            percent(s.in_sample, "mean"),
            str(s.variants_looked_at),
        )
    return table


def _decisions(report: FitReport) -> Table:
    columns = ("choices", "best found", "mean regret", "worst", "by chance", "pairs in order", "rank correlation")
    table = plain_table("Choosing the layout by held-out predictions", "source", "left out", "form", *columns, numeric=columns)
    for form in report.forms:
        for s in form.sources:
            if d := s.decisions:
                shares = (d.best_found, d.mean, d.worst, d.random, d.pairwise)
                cells = (str(d.choices), *(f"{share:.1%}" for share in shares), f"{d.rank_correlation:.2f}")
                table.add_row(s.source, " + ".join(s.by), form.name, *cells)
    return table


def _constants(form: FittedForm) -> Table:
    columns = ("prior", "its spread", "may lie", "fitted", "deviation", "over folds", "told", "folds at limit")
    table = plain_table(f"{form.name}: constants (told: share of the prior's uncertainty that rows removed)", "constant", *columns)
    for c in form.constants if form.fit else ():
        low, high = form.spread[c.name]
        table.add_row(
            c.name,
            f"{c.prior:.3g}",
            f"{c.spread:.0%}",
            f"{c.low:.3g} to {c.high:.3g}",
            f"{form.fit.values[c.name]:.3g}" if form.fit else "-",
            f"{form.fit.deviation[c.name]:.1%}" if form.fit else "-",
            f"{low:.3g} to {high:.3g}",
            f"{form.fit.told[c.name]:.0%}" if form.fit else "-",
            str(form.limited.get(c.name, 0)),
        )
    return table
