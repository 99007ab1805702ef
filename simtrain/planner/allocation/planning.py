"""Searches of one question: over all devices, over fewer nodes, and with the optimizer's states shared by the replicas.

How many replicas there will be is not known before the search, and what a device must hold of shared states depends on it. So prices
are made for some numbers of replicas; a template is tied to the least of them under which it fits, and is taken where the devices suffice
for so many. The ledger of the lowered plan decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from simtrain.core.errors import InputError
from simtrain.planner.allocation.bound import layer_bound_s
from simtrain.planner.allocation.engine_prices import sharing_factor, synchroniser
from simtrain.planner.allocation.families import Cut, Family, family, lean
from simtrain.planner.allocation.kinds import Kind
from simtrain.planner.allocation.place import Placement, improve, place_shares
from simtrain.planner.allocation.prices import Market, Share, Template
from simtrain.planner.allocation.program import Reading, read
from simtrain.planner.allocation.search import Found, Proposal, search
from simtrain.planner.allocation.stages import Job

READ = 4
"""Proposals of the search that fit and that the engine compares, whatever their device types."""

MOST_SCOPES = 24
"""Searches of one plan: over all devices, over fewer nodes, and again where the ledger refuses what the search took for fitting."""

FAR = 1.15
"""Proposals that the search expects to take so much longer than the best one read are not read, but for one of each choice of types."""

READ_EACH = 2
"""The same for each choice of device types."""

SWAPS = 5
"""Placements of the best that the engine reads beside the first one."""

LADDER = 4
"""Ratio between two numbers of replicas for which shared states are priced, from 2 on."""


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan as the engine reads it.

    Attributes:
        bound_s: What no plan on these devices can beat.
        templates: How many templates the search looked at.
        placement: Replicas with their ranks.
        zero: 1 where they share the optimizer's states.
        reading: What the engine reads off it.
    """

    bound_s: float
    templates: int
    placement: Placement
    zero: int
    reading: Reading


@dataclass(frozen=True, slots=True, eq=False)
class _Scope:
    """Where a search looks.

    Attributes:
        available: Kinds with the devices that may be used.
        market: Prices, and how many devices of each kind.
        zero: 1 where replicas share the optimizer's states.
    """

    available: Mapping[str, Kind]
    market: Market
    zero: int


class Planning:
    """A question with its prices and templates, which later searches use again.

    Args:
        job: What is allocated where.
        market: Prices without sharing.
        zeros: ZeRO stages to consider.
    """

    def __init__(self, job: Job, market: Market, zeros: Sequence[int]) -> None:
        self.job, self.market, self.zeros = job, market, tuple(sorted(set(zeros)))
        self.factor = sharing_factor(job)
        self.lean = lean(market)
        self.least: dict[Template, int] = {}
        self.families = self._families()
        self._readings: dict[tuple[Placement, int], Reading] = {}

    def best(self, counts: Mapping[str, int]) -> Planned:
        """Searches, has the engine read the best proposals, places the fastest that fits; then the same in the other scopes.

        Args:
            counts: Devices of each kind that are there.

        Raises:
            InputError: Nothing fits.
        """
        if not self.families:
            raise InputError("no search was prepared, only plans of one's own are read: use st.Allocator with templates=True")
        templates = 0
        best: tuple[Placement, int] | None = None
        refused: InputError | None = None
        scopes = list(self._scopes(counts))
        for scope in scopes:
            if best and layer_bound_s(scope.market) >= self.read(*best).step_time_s:
                continue
            try:
                found = search(scope.market, self._room(scope))
            except InputError as error:
                refused = refused or error
                continue
            templates = max(templates, found.templates)
            better, misfit = self._read_best(scope, found, best)
            best = better or best
            if misfit is not None:
                refused = refused or misfit[1]
                if misfit[0] and len(scopes) < MOST_SCOPES:
                    scopes.append(scope)  # search once more among what is left
        if best is None:
            if not templates and refused is not None:
                raise refused
            raise InputError(f"none of the plans can be placed: {refused}; give a memory_margin such as 0.05")
        placement, zero = self._polished(*best)
        return Planned(layer_bound_s(replace(self.market, counts=dict(counts))), templates, placement, zero, self.read(placement, zero))

    def given(self, plan: Sequence[Share], zero: int) -> Planned:
        """Places and reads a plan of one's own.

        Raises:
            InputError: Stages do not go into the nodes.
        """
        placement = self._improved(self._placed(self.job.kinds, plan, zero), zero)
        templates = len({s.template for s in plan})
        return Planned(layer_bound_s(self.market), templates, placement, zero, self.read(placement, zero))

    def read(self, placement: Placement, zero: int) -> Reading:
        """Has the engine read a plan, once."""
        if (placement, zero) not in self._readings:
            self._readings[placement, zero] = read(replace(self.job, zero=zero), self.market, placement)
        return self._readings[placement, zero]

    def _families(self) -> dict[int, Family]:
        """Templates by ZeRO stage.

        With shared states those that fit if two replicas share them, those that fit only if more do, and so on: each is given the least
        number of replicas. There are none where whole states are considered too and nothing else would fit: then plans with whole states
        are read with shared ones in the end.
        """
        cut: Cut = {}
        families = {0: family(self.lean, cut)} if 0 in self.zeros else {}
        if 1 not in self.zeros:
            return families
        alone = {t for f in families.values() for t in f.templates}
        least = 2 if 0 in self.zeros else 1
        while least <= max(sum(self.market.counts.values()), 2):
            priced = family(self.lean.shared(least, self.factor), cut)
            fresh = priced.chosen([t not in self.least for t in priced.templates])
            self.least |= dict.fromkeys(fresh.templates, least)
            families[1] = families[1].beside(fresh) if 1 in families else fresh
            least = least * LADDER if least > 1 else 2
        if families and alone.issuperset(families[1].templates):
            del families[1]
        return families

    def _priced(self, market: Market, zero: int) -> Market:
        return market.shared(2, self.factor) if zero else market

    def _scopes(self, counts: Mapping[str, int]) -> Iterator[_Scope]:
        """All devices, states whole and shared; then each kind alone in fewer nodes, for where what lies between nodes is slow."""
        available = self._available(counts)
        for zero in self.families:
            yield _Scope(available, self._priced(replace(self.lean, counts=dict(counts)), zero), zero)
        gradients = max(float(price.gradient_bytes.sum()) for price in self.market.prices.values())
        first = next(iter(self.families))
        for name, kind in available.items():
            nodes = [ranks for ranks in kind.nodes if ranks]
            few = len(nodes) // 2
            while few:
                alone = {name: replace(kind, nodes=tuple(nodes[:few]))}
                there = {k: alone[k].count if k in alone else 0 for k in counts}
                fewer = replace(self.lean, counts=there, synchronise_s=synchroniser(replace(self.job, kinds=alone), gradients))
                yield _Scope(alone, self._priced(fewer, first), first)
                few //= 2

    def _room(self, scope: _Scope) -> Family:
        """Templates of a scope; of those that fit only with shared states the ones that leave room for so many replicas."""
        known = self.families[scope.zero]
        if not scope.zero:
            return known
        devices = sum(scope.market.counts.values())
        pairs = zip(known.templates, known.needs, strict=True)
        return known.chosen([self.least[template] * sum(need.values()) <= devices for template, need in pairs])

    def _read_best(
        self, scope: _Scope, found: Found, best: tuple[Placement, int] | None
    ) -> tuple[tuple[Placement, int] | None, tuple[bool, InputError] | None]:
        """Reads the best proposals of a search.

        Returns:
            What is faster than the best known, if anything is; and if something did not go in or fit, whether templates were dropped for
            it, and why.
        """
        better: tuple[Placement, int] | None = None
        misfit: tuple[bool, InputError] | None = None
        seen: Counter[frozenset[str]] = Counter()
        for proposal in found.proposals:
            known = better or best
            if not self._worth_reading(proposal, seen, self.read(*known).step_time_s if known else np.inf):
                continue
            try:
                placement = self._placed(scope.available, proposal.shares, scope.zero)
            except InputError as error:
                misfit = (bool(misfit and misfit[0]), error)
                continue
            reading = self.read(placement, scope.zero)
            if not reading.fits:
                dropped = self._without(scope, placement, reading)
                misfit = (dropped or bool(misfit and misfit[0]), InputError("the ledger of a stage exceeds its device's memory"))
                continue
            seen[proposal.kinds] += 1
            if not known or reading.step_time_s < self.read(*known).step_time_s:
                better = (placement, scope.zero)
        return better, misfit

    @staticmethod
    def _worth_reading(proposal: Proposal, seen: Counter[frozenset[str]], best_s: float) -> bool:
        if seen.total() >= READ and seen[proposal.kinds] >= READ_EACH:
            return False
        return not (seen[proposal.kinds] and proposal.step_time_s > FAR * best_s)

    def _without(self, scope: _Scope, placement: Placement, reading: Reading) -> bool:
        """Drops templates of which a stage exceeds its devices' memory; returns whether there were any left to drop."""
        memory = iter(reading.memory)
        own = {p.share.template: list(islice(memory, len(p.share.template.stages))) for p in placement}
        full = {template for template, stages in own.items() if not all(m.fits for m in stages)}
        known = self.families[scope.zero]
        kept = [t not in full for t in known.templates]
        self.families[scope.zero] = known.chosen(kept)
        return not all(kept)

    def _polished(self, placement: Placement, zero: int) -> tuple[Placement, int]:
        """Swaps devices where that helps, and takes the other ZeRO stage where the same plan fits and is faster with it."""
        placement = self._improved(placement, zero)
        for other in self.zeros if sum(p.share.copies for p in placement) > 1 else ():
            reading = self.read(placement, other)
            if reading.fits and reading.step_time_s < self.read(placement, zero).step_time_s:
                zero = other
        return placement, zero

    def _placed(self, available: Mapping[str, Kind], plan: Sequence[Share], zero: int) -> Placement:
        """The faster of two placements, where there is a choice."""
        first = place_shares(available, plan)
        if len(self.job.cluster.nodes) == 1 or all(len(s.template.stages) == 1 for s in plan):
            return first
        return min((first, place_shares(available, plan, together="stage")), key=lambda p: self.read(p, zero).step_time_s)

    def _improved(self, placement: Placement, zero: int) -> Placement:
        if len(self.job.cluster.nodes) == 1 or all(len(p.share.template.stages) == 1 for p in placement):
            return placement
        return improve(placement, lambda p: self.read(p, zero).step_time_s, SWAPS)[0]

    def _available(self, counts: Mapping[str, int]) -> dict[str, Kind]:
        """Kinds with so many devices: the last ones are those that are not there."""
        kinds = {}
        for name, kind in self.job.kinds.items():
            gone, nodes = kind.count - counts[name], []
            for ranks in reversed(kind.nodes):
                kept = ranks[: max(len(ranks) - gone, 0)]
                gone -= len(ranks) - len(kept)
                nodes.append(kept)
            kinds[name] = replace(kind, nodes=tuple(reversed(nodes)))
        return kinds
