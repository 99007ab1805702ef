"""What mixed precision gains over fp32 and TF32: published throughput of one model on one device in both, against predictions.

The ratio of two rates on one device is what is left when constants that both share cancel. The null model is one ratio for each device and
pair of arithmetic paths, whatever the model: in sample, its best constant from these very rows, which is exact where a device has one row
alone; and held out, as predictions are, from rows of other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simtrain.core.precision import precision
from validation.errors import ErrorSummary, skill, summarise
from validation.published import PublishedRow, PublishedSet, load, predict

FITTED = ("bert_single_gpu", "resnet50_workstation_gpu")
"""Sets that constants of the GPU model were fitted on."""

HELD_OUT = ("bert_rtx3090", "bert_dgx", "bert_pretraining_128_dgx", "bert_pretraining_512_dgx", "resnet50_single_gpu", "resnet50_dgx")
"""Sets that no constant was fitted on."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Throughput in mixed precision over that in fp32 or TF32, each with its own batch.

    Attributes:
        dataset: Name of the set of both rows.
        model: Catalog name.
        device: Catalog name.
        wide: Arithmetic path of the slower row ("fp32" or "tf32").
        measured: As published.
        predicted: From data sheets and constants.
    """

    dataset: str
    model: str
    device: str
    wide: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative error of the ratio, with sign."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True)
class RatioReport:
    """Ratios of some sets.

    Attributes:
        title: One line.
        ratios: Of all models and devices.
        others: Ratios that the null model may look at besides.
        print_rows: Whether the text lists every row.
    """

    title: str
    ratios: tuple[Ratio, ...]
    others: tuple[Ratio, ...] = ()
    print_rows: bool = True

    @property
    def errors(self) -> ErrorSummary:
        """Of the predictions."""
        return summarise([r.error for r in self.ratios])

    @property
    def null(self) -> ErrorSummary:
        """Of one ratio per device and pair of paths, the best constant of these very rows."""
        return self._null(seen=True)

    @property
    def null_held_out(self) -> ErrorSummary:
        """The same from rows of other models: on that device where there are any, else on all."""
        return self._null(seen=False)

    def _null(self, *, seen: bool) -> ErrorSummary:
        pool = self.ratios + self.others
        errors = []
        for ratio in self.ratios:
            if seen:
                near = [r.measured for r in self.ratios if (r.device, r.wide) == (ratio.device, ratio.wide)]
            else:
                others = [r for r in pool if r.model != ratio.model and r.wide == ratio.wide]
                near = [r.measured for r in others if r.device == ratio.device] or [r.measured for r in others]
            errors.append(float(np.median(near)) / ratio.measured - 1)
        return summarise(errors)

    @property
    def alone(self) -> int:
        """Rows that are their device's only one: the null model in sample copies them."""
        keys = [(r.device, r.wide) for r in self.ratios]
        return sum(keys.count(key) == 1 for key in keys)

    @property
    def worst(self) -> Ratio:
        """The prediction that is furthest off."""
        return max(self.ratios, key=lambda r: abs(r.error))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        nulls = {"one ratio per device, in sample": self.null, "one ratio per device, held out by model": self.null_held_out}
        return {
            "title": self.title,
            "summary": self.errors.to_dict(),
            "nulls": {name: null.to_dict() | {"skill": skill(self.errors, null)} for name, null in nulls.items()},
            "rows": [
                {"set": r.dataset, "model": r.model, "device": r.device, "wide": r.wide, "measured": r.measured, "predicted": r.predicted}
                for r in self.ratios
            ],
        }

    def __str__(self) -> str:
        lines = [self.title]
        header = f"{'set':<26}{'model':<12}{'device':<15}{'amp over':<10}{'measured':>9}{'predicted':>10}{'error':>8}"
        lines += [header] * self.print_rows
        lines += [
            f"{r.dataset:<26}{r.model:<12}{r.device:<15}{r.wide:<10}{r.measured:>9.2f}{r.predicted:>10.2f}{r.error:>+8.1%}"
            for r in sorted(self.ratios if self.print_rows else (), key=lambda r: abs(r.error))
        ]
        lines.append(f"predictions  {self.errors}")
        held_out = self.null_held_out
        lines.append(f"null, held out by model: one ratio per device  {held_out}; skill {skill(self.errors, held_out):.2f}")
        lines.append(f"null, in sample: the best ratio per device of these rows  {self.null}; skill {skill(self.errors, self.null):.2f}")
        lines.append(f"(in sample, {self.alone} of {len(self.ratios)} rows are their device's only one, which the null copies)")
        worst = self.worst
        lines.append(f"worst: {worst.model} on {worst.device} ({worst.dataset}), {worst.error:+.1%}")
        return "\n".join(lines)


def compare() -> tuple[RatioReport, RatioReport, RatioReport]:
    """Predicts the ratios of all shipped sets: of those that nothing was fitted on, of the others, and of both.

    A device with one row is its own null model, so that the last, with most rows for each device, is the fairest to compare.
    """
    held_out, fitted = (tuple(r for name in names for r in ratios(name, load(name))) for names in (HELD_OUT, FITTED))
    return (
        RatioReport("Mixed precision over fp32 and TF32, sets that no constant was fitted on", held_out, fitted),
        RatioReport("The same, sets that constants were fitted on: what is left of their errors is no prediction", fitted, held_out),
        RatioReport("All sets together", held_out + fitted, print_rows=False),
    )


def ratios(name: str, dataset: PublishedSet) -> list[Ratio]:
    """Pairs the rows of a set on one device, mixed precision over the other."""
    alone = [row for row in dataset.rows if row.devices == 1]
    found = []
    for narrow in alone:
        path = precision(narrow.precision).arithmetic
        if path.size_bytes > 2:
            continue
        for wide in _partners(narrow, alone):
            predicted = predict(dataset, narrow) / predict(dataset, wide)
            arithmetic = precision(wide.precision).arithmetic.value
            found.append(Ratio(name, narrow.model, narrow.device, arithmetic, narrow.samples_per_s / wide.samples_per_s, predicted))
    return found


def _partners(narrow: PublishedRow, rows: Sequence[PublishedRow]) -> list[PublishedRow]:
    same = [r for r in rows if (r.model, r.device) == (narrow.model, narrow.device)]
    return [r for r in same if precision(r.precision).arithmetic.size_bytes > 2]


__all__ = ["FITTED", "HELD_OUT", "Ratio", "RatioReport", "compare", "ratios"]
