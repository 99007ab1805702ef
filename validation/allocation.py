"""Allocations for mixed clusters against the plans of Sailor (SOSP'25): the same costs, the same terms, one event evaluator for both."""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.planner.allocation.bound import check_bound, replica_bound_s
from simtrain.planner.allocation.prices import LayerPrices, Market, Share, StageUse, Template, Transfers, Unit
from simtrain.planner.allocation.search import Proposal, evaluate, search

FORWARD_SHARE = 1 / 3
STATE_BYTES = 24
COUNTED_STATE_BYTES = 20
PARAMETER_BYTES = 4
FRAMEWORK_GIB = (2, 3)
MB, GB, MIB, GIB = 1e6, 1e9, 2**20, 2**30
MOST_PAIRS = 4


@dataclass(frozen=True)
class SailorCase:
    """The transcribed inputs as a market.

    Attributes:
        data: As in the file.
    """

    data: Mapping[str, Any]

    @classmethod
    def read(cls) -> SailorCase:
        """Reads the transcription."""
        return cls(tomllib.loads(files("validation").joinpath("published", "sailor_mixed.toml").read_text()))

    @cached_property
    def _shape(self) -> FloatArray:
        megabytes, shares = np.array(self.data["network"]["rate_share"]).T
        return np.polyfit(np.log2(megabytes), shares, 2)

    def rate(self, device: str, pairs: int, size_bytes: float) -> float:
        """Bytes per second between two nodes, so many devices of each sending one message each of that size together."""
        network = self.data["network"]
        one, four = network["one_pair_gb_per_s"][device], network["four_pairs_gb_per_s"][device]
        large: float = {1: one, 2: min(2 * one, four), MOST_PAIRS: four}[pairs]
        least, most = (network["rate_share"][i][0] for i in (0, -1))
        return large * GB * float(np.polyval(self._shape, math.log2(min(max(size_bytes / MB, least / 4), most))))

    def send_s(self, a: Unit, b: Unit, micro_batch: int, together: bool) -> float:
        """One transfer between stages."""
        size = float(self.data["model"]["activation_bytes_per_sample"] * micro_batch)
        if together:
            return size / float(self.data["network"]["nvlink_gb_per_s"][a.kind] * GB)
        return float(size / min(self.rate(u.kind, min(u.tensor, MOST_PAIRS), size) for u in (a, b)))

    def synchronise_s(self, size_bytes: float, replicas: int, kinds: frozenset[str]) -> float:
        """Ring all-reduce in buckets: 2(D-1) messages of a D-th of each."""
        bucket, total, left = self.data["network"]["bucket_bytes"], 0.0, size_bytes
        while left > 0:
            message = min(left, bucket) / replicas
            total += 2 * (replicas - 1) * message / min(self.rate(kind, 1, message) for kind in kinds)
            left -= bucket
        return total

    @cached_property
    def prices(self) -> dict[tuple[Unit, int], LayerPrices]:
        """Costs of layers on units."""
        rows = {(row[0], row[1], row[2]): row[3:] for row in self.data["costs"]}
        return {(Unit(d, t), b): self._price(rows, d, t, b) for d, t, b in rows}

    def _price(self, rows: Mapping[tuple[str, int, int], Sequence[float]], device: str, tensor: int, size: int) -> LayerPrices:
        blocks = self.data["model"]["blocks"]

        def spread(embedding: float, block: float, head: float) -> FloatArray:
            return np.array([embedding, *[block] * blocks, head], dtype=np.float64)

        passes = spread(*rows[device, tensor, size][:3]) * 1e-3
        one, two = (spread(*rows[device, tensor, b][-3:]) * MIB for b in (1, 2))
        activation, counted = two - one, 2 * one - two
        parameters = counted / COUNTED_STATE_BYTES
        return LayerPrices(
            forward_s=passes * FORWARD_SHARE,
            backward_s=passes * (1 - FORWARD_SHARE),
            least_s=passes,
            update_s=rows[device, tensor, size][3] * 1e-3 * parameters / parameters.sum(),
            gradient_bytes=parameters * PARAMETER_BYTES,
            fixed_bytes=parameters * STATE_BYTES,
            kept_bytes=activation * size,
            spare_bytes=(self.data["memory_gib"][device] - FRAMEWORK_GIB[tensor > 1]) * GIB,
        )

    def market(self, counts: Mapping[str, int], transfers: Transfers = "rendezvous") -> Market:
        """The question for a cluster."""
        nodes = dict.fromkeys(counts, int(self.data["network"]["devices_per_node"]))
        return Market(
            counts=dict(counts),
            prices=self.prices,
            send_s=self.send_s,
            synchronise_s=self.synchronise_s,
            global_batch=self.data["model"]["global_batch"],
            node_devices=nodes,
            transfers=transfers,
        )

    def counts(self, cluster: Mapping[str, Any]) -> dict[str, int]:
        """Devices of a cluster."""
        return {name: cluster[name] for name in self.data["memory_gib"]}


def published_plan(cluster: Mapping[str, Any]) -> tuple[Share, ...]:
    """Sailor's plan for a cluster."""
    found = []
    for group in cluster["groups"]:
        ends = np.cumsum([layers for _, _, layers in group["stages"]]).tolist()
        uses = zip(group["stages"], [0, *ends[:-1]], ends, strict=True)
        stages = tuple(StageUse(Unit(device, tensor), start, end) for (device, tensor, _), start, end in uses)
        found.append(Share(Template(stages, group["micro_batch"]), group["copies"], group["micro_batches"]))
    return tuple(found)


def evaluate_published(case: SailorCase, cluster: Mapping[str, Any], transfers: Transfers = "rendezvous") -> Proposal:
    """Sailor's plan in our evaluator; its placement leaves no two stages of a replica in one node."""
    market = case.market(case.counts(cluster), transfers)
    return evaluate(replace(market, node_devices=dict.fromkeys(market.counts, 1)), published_plan(cluster))


@dataclass(frozen=True, slots=True)
class AllocationRow:
    """One cluster.

    Attributes:
        cluster: In words.
        steps_per_s: Of our plan.
        search_s: Of our search.
        published_steps_per_s: Of Sailor's plan, as computed elsewhere with both ends waiting.
        reproduced_steps_per_s: Of Sailor's plan in our evaluator.
        published_search_s: Of Sailor's planner.
        bound_steps_per_s: What nothing can beat, layer by layer.
        replica_bound_steps_per_s: The same where no replica mixes types.
        plan: Ours, in words.
    """

    cluster: str
    steps_per_s: float
    search_s: float
    published_steps_per_s: float
    reproduced_steps_per_s: float
    published_search_s: float
    bound_steps_per_s: float
    replica_bound_steps_per_s: float
    plan: tuple[str, ...]

    @property
    def gain(self) -> float:
        """Over the faster of the two figures for Sailor's plan."""
        return self.steps_per_s / max(self.published_steps_per_s, self.reproduced_steps_per_s)


@dataclass(frozen=True, slots=True)
class AllocationReport:
    """All clusters.

    Attributes:
        title: Of the comparison.
        rows: One for each cluster.
        notes: Of the source.
        assumptions: In words.
    """

    title: str
    rows: tuple[AllocationRow, ...]
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        names = AllocationRow.__dataclass_fields__
        rows = [{n: getattr(row, n) for n in names} | {"gain": row.gain} for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes), "assumptions": list(self.assumptions)}

    def __str__(self) -> str:
        head = f"{'cluster':<24}{'steps/s':>9}{'search':>9}{'Sailor':>9}{'(here)':>9}{'search':>9}{'gain':>8}{'bound':>9}{'aggregate':>11}"
        lines = [self.title, head]
        for row in self.rows:
            lines.append(
                f"{row.cluster:<24}{row.steps_per_s:>9.4f}{row.search_s:>7.1f} s{row.published_steps_per_s:>9.3f}"
                f"{row.reproduced_steps_per_s:>9.3f}{row.published_search_s:>7.1f} s{row.gain:>7.2f}x{row.bound_steps_per_s:>9.3f}"
                f"{row.replica_bound_steps_per_s:>11.3f}"
            )
            lines += [f"    {line}" for line in row.plan]
        lines += ["gain: over the faster of the two figures for Sailor's plan; aggregate: bound without replicas of mixed types"]
        return "\n".join([*lines, "Assumed:", *(f"  - {text}" for text in self.assumptions)])


def compare() -> AllocationReport:
    """Plans every cluster and evaluates both plans by events, both ends of a transfer waiting."""
    case = SailorCase.read()
    rows = []
    for cluster in case.data["cluster"]:
        counts = case.counts(cluster)
        start_s = time.perf_counter()
        market = case.market(counts)
        found = search(market)
        elapsed_s = time.perf_counter() - start_s
        best = found.proposals[0]
        check_bound(found.bound_s, best.step_time_s)
        rows.append(
            AllocationRow(
                cluster=" + ".join(f"{n} {kind}" for kind, n in counts.items()),
                steps_per_s=1 / best.step_time_s,
                search_s=elapsed_s,
                published_steps_per_s=cluster["rendezvous_steps_per_s"],
                reproduced_steps_per_s=1 / evaluate_published(case, cluster).step_time_s,
                published_search_s=cluster["search_s"],
                bound_steps_per_s=1 / found.bound_s,
                replica_bound_steps_per_s=1 / replica_bound_s(market),
                plan=tuple(f"{s.copies} x ({s.template}), {s.micro_batches} micro-batches each" for s in best.shares),
            )
        )
    return AllocationReport(case.data["title"], tuple(rows), tuple(case.data["notes"]), tuple(case.data["assumptions"]))
