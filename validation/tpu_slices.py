"""Published steps of transformers on TPU slices against the whole engine: chip, sharding over the torus, and sums between slices.

What a row ran is stated by its scripts: parameters, gradients and optimizer states sharded over the chips of a slice (ZeRO 3), whole
copies on several slices, bf16 gathered and multiplied, fp32 weights updated, blocks recomputed. The first prediction fits nothing. Then one
number per chip, the share of clocks in which a busy array does useful work, is fitted to the other groups of rows of that chip, and
judged beside the null under the same rule: one MFU per chip from the other groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware_models.systolic import constants_of
from simtrain.core import catalog
from simtrain.core.hardware import Cluster, Device, Node
from simtrain.core.network import SWITCH, Network
from simtrain.core.precision import DType
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import Strategy
from simtrain.step.predict import schedule
from validation.errors import ErrorSummary, skill, summarise
from validation.kernels_published import load_table, tpu_workload

CHIPS_PER_HOST = {"tpu-v4": 4, "tpu-v5e": 8, "tpu-v5p": 4, "tpu-v6e": 8}
"""Chips that share the host's network ports; sources in the clusters `tpu-*-host` of the catalog."""

TORUS_AXES = {"tpu-v4": 3, "tpu-v5e": 2, "tpu-v5p": 3, "tpu-v6e": 2}
"""Axes of a slice's torus, over which a chip's links are split evenly; sources in the links `ici-*` of the catalog."""

CHECKPOINTS = {"full": "full", "minimal": "none", "custom": "full"}
"""What a policy of MaxText recomputes. "minimal" keeps the products and makes little else again; what Trillium's recipes keep on the
host is fetched beside other work at best, so that they are taken as if it were made again (assumption)."""

PRECISION = "bf16-master"
"""MaxText's defaults: weights and optimizer fp32, cast where they lie sharded, gathered and multiplied in bf16."""

FRAMEWORK = "xla"
BETWEEN_SLICES = "dcn-200g"
LATE_SHARE = 0.75
"""Second share of useful clocks at which the engine is asked: steps are linear in its inverse, as nothing else hides products."""
VARIANTS_LOOKED_AT = 6
"""GPU preset; XLA with autocast; with weights cast where they lie; reductions hidden; Trillium without recomputation; as it is."""

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SliceRow:
    """One measured step.

    Attributes:
        name: For reports.
        device: Chip.
        group: What is held out together: chip, model and number of slices.
        measured_s: Step time, from tokens per second where printed, else from FLOP/s.
        predicted_s: Nothing fitted.
        fitted_s: By a share of the chip's clocks that other groups of the same chip gave; `None` where it has no other group.
        other_chips_s: By the share that the other chips gave.
        null_s: By the median MFU of the chip's other groups; `None` where it has none.
        null_other_chips_s: By the median MFU of the other chips.
        null_seen_s: By the median MFU of the chip, this row included.
    """

    name: str
    device: str
    group: tuple[Any, ...]
    measured_s: float
    predicted_s: float
    fitted_s: float | None
    other_chips_s: float | None
    null_s: float | None
    null_other_chips_s: float | None
    null_seen_s: float | None


@dataclass(frozen=True, slots=True)
class SliceReport:
    """Rows on TPU slices, predicted.

    Attributes:
        rows: One comparison each.
        shares: Share of useful clocks of each chip, fitted to all its rows.
    """

    rows: tuple[SliceRow, ...]
    shares: Mapping[str, float]

    def errors(self, name: str) -> ErrorSummary:
        """Errors of step time by one of the predictions, over the rows that have it."""
        pairs = ((getattr(r, name), r.measured_s) for r in self.rows)
        return summarise([found / measured - 1 for found, measured in pairs if found is not None])

    @property
    def summaries(self) -> dict[str, ErrorSummary]:
        """Of every prediction and null, by what it is."""
        return {
            "nothing fitted": self.errors("predicted_s"),
            "share of clocks from other chips": self.errors("other_chips_s"),
            "null: one MFU from other chips": self.errors("null_other_chips_s"),
            "share of clocks per chip, group held out": self.errors("fitted_s"),
            "null: one MFU per chip, group held out": self.errors("null_s"),
            "null: one MFU per chip that has seen the row": self.errors("null_seen_s"),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "summaries": {name: summary.to_dict() for name, summary in self.summaries.items()},
            "shares": dict(self.shares),
            "variants_looked_at": VARIANTS_LOOKED_AT,
            "rows": [
                {"name": r.name, "measured_s": r.measured_s, "predicted_s": r.predicted_s, "fitted_s": r.fitted_s, "null_s": r.null_s}
                for r in self.rows
            ],
        }

    def __str__(self) -> str:
        lines = ["Transformers on TPU slices: whole steps", f"{'row':<34}{'measured':>9}{'blind':>8}{'held out':>10}{'null':>8}"]
        for r in self.rows:
            cells = [f"{found / r.measured_s - 1:+.1%}" if found else "-" for found in (r.predicted_s, r.fitted_s, r.null_s)]
            lines.append(f"{r.name:<34}{r.measured_s:>7.2f} s{cells[0]:>8}{cells[1]:>10}{cells[2]:>8}")
        lines += [f"{name}: {summary}" for name, summary in self.summaries.items()]
        held, null = self.errors("fitted_s"), self.errors("null_s")
        lines.append(
            f"skill over the null, group held out: {skill(held, null):.2f}; variants looked at on these rows: {VARIANTS_LOOKED_AT}"
        )
        lines.append("share of useful clocks, all rows of a chip: " + ", ".join(f"{k} {v:.3f}" for k, v in self.shares.items()))
        return "\n".join(lines)


def compare_slices(chosen: Sequence[int] | None = None) -> SliceReport:
    """Predicts the published steps (or some of them, by number)."""
    table = load_table("tpu_transformers")["row"]
    rows = [table[i] for i in (range(len(table)) if chosen is None else chosen)]
    measured = np.array([measured_s(row) for row in rows])
    share = constants_of(catalog.device(rows[0]["device"])).array_share
    blind = np.array([predict_s(row) for row in rows])
    slope = (np.array([predict_s(row, LATE_SHARE) for row in rows]) - blind) / (1 / LATE_SHARE - 1 / share)
    wanted = 1 / share + (measured - blind) / slope  # inverse share with which each row would be exact
    peak = np.array([_seconds_at_peak(row) for row in rows])
    device = np.array([row["device"] for row in rows])
    groups = [(row["device"], row["layers"], row["slices"]) for row in rows]
    found = []
    for i, row in enumerate(rows):
        same = device == device[i]
        held = same & np.array([group != groups[i] for group in groups])

        def engine(keep: BoolArray, i: int = i) -> float | None:
            return float(blind[i] + slope[i] * (np.median(wanted[keep]) - 1 / share)) if keep.any() else None

        def null(keep: BoolArray, i: int = i) -> float | None:
            return float(peak[i] / np.median(peak[keep] / measured[keep])) if keep.any() else None

        name = f"{row['device']} x{row['chips']} {row['layers']}x{row['hidden']} b{row['micro_batch']}"
        times = (float(blind[i]), engine(held), engine(~same), null(held), null(~same), null(same))
        found.append(SliceRow(name, row["device"], groups[i], float(measured[i]), *times))
    return SliceReport(tuple(found), {d: 1 / float(np.median(wanted[device == d])) for d in dict.fromkeys(device.tolist())})


def predict_s(row: Mapping[str, Any], array_share: float | None = None) -> float:
    """Returns the predicted time of a row's step, with another share of useful clocks if one is given."""
    device = catalog.device(row["device"])
    if array_share is not None:
        device = replace(device, profile={**device.profile, "array_share": array_share})
    tensor = row["tensor"]
    strategy = Strategy(
        data=row["chips"] // tensor,
        tensor=tensor,
        sequence_parallel=tensor > 1,
        zero=3,
        shard=row["chips"] // row["slices"] // tensor,
        micro_batch=row["micro_batch"] * tensor,
        precision=PRECISION,
        checkpoint=CHECKPOINTS[row["recompute"]],
    )
    return schedule(tpu_workload(row), slices(row, device), strategy, runtime=runtime(FRAMEWORK)).step_time_s


def slices(row: Mapping[str, Any], device: Device) -> Cluster:
    """Returns slices of a torus, joined by their hosts' ports.

    A slice of which all chips share everything is one node: collectives over the whole torus use all links. Under tensor parallelism a
    group lies along one axis: it is a node, whose chips reach the others by the links of the remaining axes.
    """
    tensor, count = row["tensor"], row["slices"]
    chips = row["chips"] // count
    hosts = max(chips // CHIPS_PER_HOST[row["device"]], 1)
    ici, dcn = catalog.link(device.peer_link or ""), catalog.link(BETWEEN_SLICES)
    if tensor == 1:
        node = Node((device,) * chips, None, catalog.link(device.host_link), ici, nic=dcn, nics=hosts)
        return Cluster(f"{count}x {chips}x {device.name}", (node,) * count)
    axes = TORUS_AXES[row["device"]]
    axis = replace(ici, name=f"{ici.name}-axis", bandwidth_bytes_per_s=ici.bandwidth_bytes_per_s / axes)
    rest = replace(ici, name=f"{ici.name}-other-axes", bandwidth_bytes_per_s=ici.bandwidth_bytes_per_s * (axes - 1) / axes)
    node = Node((device,) * tensor, None, rest, axis, nic=rest, nics=tensor)
    thinner = chips * rest.sustained_bytes_per_s / (hosts * dcn.sustained_bytes_per_s)
    network = Network("fat-tree", nodes_per_group=chips // tensor, oversubscription=thinner) if count > 1 else SWITCH
    return Cluster(f"{count}x {chips}x {device.name}", (node,) * (chips // tensor * count), network=network)


def measured_s(row: Mapping[str, Any]) -> float:
    """Returns the measured step time, by the framework's count of operations where it prints nothing else."""
    if row["tokens_per_s"]:
        return float(row["micro_batch"] * row["chips"] * row["tokens"] / row["tokens_per_s"])
    return counted_flops(row) / (float(row["tflops_per_chip"]) * 1e12)


def counted_flops(row: Mapping[str, Any]) -> float:
    """FLOPs of a chip's step as MaxText counts them: six per weight and token, and attention in full."""
    work = tpu_workload(row)
    width = row["hidden"] if not row["gated"] else 128 * row["heads"]
    per_token = 6.0 * work.parameter_count + 12.0 * row["layers"] * width * row["tokens"]
    return float(per_token * row["micro_batch"] * row["tokens"])


def _seconds_at_peak(row: Mapping[str, Any]) -> float:
    return counted_flops(row) / catalog.device(row["device"]).peak(DType.BF16)


__all__ = ["SliceReport", "SliceRow", "compare_slices", "counted_flops", "measured_s", "predict_s", "slices"]
