"""`estimate`: the same costs as `schedule`, composed in closed form.

The device runs passes in order: pass i cannot start before it is ready, so the end of pass j is
`C[j+1] + max(0, max over i <= j of (ready[i] - C[i]))` with C the running sum of durations. Three chains have this form: passes waiting
for the host to issue them, buckets waiting for the passes that fill them, copies waiting for reduced buckets. Without a synchronisation
the host runs ahead across steps, and the period is the larger of what the host needs and what the device needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import TermKind
from simtrain.core.result import Result
from simtrain.cost.collectives import CollectiveCost
from simtrain.step.breakdown import PARTS
from simtrain.step.buckets import Bucket
from simtrain.step.costs import TERM_KINDS, PassCost
from simtrain.step.lower import StepCosts, bucket_cells, collectives, rank_classes, step_costs
from simtrain.step.results import assemble, by_rank, memory_report
from simtrain.step.setting import Setting

NOTE = "closed form: hosts and devices are composed per step, transients between steps are left out"


def in_order(ready_s: FloatArray, durations_s: FloatArray, start_s: float = 0.0) -> FloatArray:
    """Ends of jobs that run one after the other, none before it is ready: `end[j] = max(end[j-1], ready[j]) + t[j]`."""
    before = np.concatenate([[0.0], np.cumsum(durations_s)])
    latest = np.maximum.accumulate(np.maximum(ready_s - before[:-1], start_s))
    return np.asarray(before[1:] + latest, dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """A rank class's step, flattened.

    Attributes:
        costs: Where it comes from.
        passes: Cost of each pass of all micro-batches.
        ends: End of each pass.
        free: When the device becomes free for the first pass: after the optimizer and the gather, if the host had to wait.
    """

    costs: StepCosts
    passes: tuple[PassCost, ...]
    ends: FloatArray
    free: float

    @property
    def host_s(self) -> float:
        """Time the host needs to issue the whole step."""
        return sum(c.host_s for c in (*self.passes, *self.costs.copy_back, self.costs.update))


def estimate_setting(setting: Setting) -> Result:
    """Predicts a step in closed form."""
    buckets, reductions, gather = collectives(setting)
    classes = rank_classes(setting, split=False)
    synchronised = setting.precision.loss_scaling and setting.runtime.run_ahead_launches > 0
    gather_s = gather.time_s if gather else 0.0
    chains = [_chain(step_costs(setting, c.device, buckets), setting.strategy.accumulation, synchronised, gather_s) for c in classes]
    reduced = _reduced(setting, chains, buckets, reductions)
    periods = [_period(chain, reduced, gather_s, synchronised) for chain in chains]
    slowest = int(np.argmax(periods))
    parts = _breakdown(chains[slowest], setting.strategy.accumulation, periods[slowest], reduced, gather_s)
    busy = [_busy_s(chain) for chain in chains]
    streams = {"compute": busy[slowest], "communication": sum(r.time_s for r in reductions) + gather_s}
    if setting.runtime.run_ahead_launches > 0:
        streams["host"] = chains[slowest].host_s
    return assemble(
        setting,
        "estimate",
        periods[slowest],
        parts,
        streams,
        memory_report(setting),
        notes=(NOTE,),
        busy_by_rank=by_rank(classes, busy),
    )


def _chain(costs: StepCosts, accumulation: int, synchronised: bool, gather_s: float) -> _Chain:
    passes = costs.last
    if accumulation > 1:
        passes = (*costs.costs[0], *(costs.costs[1] * (accumulation - 2)), *costs.last)
    device = np.array([c.device_s for c in passes])
    if not synchronised:
        return _Chain(costs, passes, np.cumsum(device), 0.0)
    # the clock starts when the host resumes: it issues the optimizer, then the passes of the next step
    free = costs.update.lead_s + costs.update.device_s + gather_s
    ready = costs.update.host_s + _issued(passes)
    return _Chain(costs, passes, in_order(ready, device, free), free)


def _issued(passes: tuple[PassCost, ...]) -> FloatArray:
    """When each pass may start, counted from when the host begins with the first."""
    before = np.concatenate([[0.0], np.cumsum([c.host_s for c in passes])])[:-1]
    return np.asarray(before + np.array([c.lead_s for c in passes]), dtype=np.float64)


def _reduced(setting: Setting, chains: list[_Chain], buckets: tuple[Bucket, ...], reductions: tuple[CollectiveCost, ...]) -> FloatArray:
    """When each bucket has been reduced."""
    if not buckets:
        return np.zeros(0)
    overlap = setting.runtime.overlap_communication
    ready = np.max([[chain.ends[cell if overlap else -1] for cell in bucket_cells(chain.costs, buckets)] for chain in chains], axis=0)
    return in_order(ready, np.array([r.time_s for r in reductions]))


def _finish(chain: _Chain, reduced: FloatArray, synchronised: bool) -> float:
    """When gradients are where the optimizer wants them."""
    end = float(chain.ends[-1])
    if not len(reduced):
        return end
    if not chain.costs.copy_back:
        return max(end, float(reduced[-1]))
    ready = np.maximum(reduced, end)
    if synchronised:
        before = chain.costs.update.host_s + sum(c.host_s for c in chain.passes)
        ready = np.maximum(ready, before + _issued(chain.costs.copy_back))
    return float(in_order(ready, np.array([c.device_s for c in chain.costs.copy_back]))[-1])


def _period(chain: _Chain, reduced: FloatArray, gather_s: float, synchronised: bool) -> float:
    finish = _finish(chain, reduced, synchronised)
    if synchronised:
        # the host itself resumes only once it has issued everything up to the optimizer
        return max(finish, chain.host_s)
    return max(finish + chain.costs.update.device_s + gather_s, chain.host_s)


def _busy_s(chain: _Chain) -> float:
    return sum(c.device_s for c in (*chain.passes, *chain.costs.copy_back, chain.costs.update))


def _breakdown(chain: _Chain, accumulation: int, period_s: float, reduced: FloatArray, gather_s: float) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    modes = [p.mode for p in chain.costs.first] + [p.mode for p in chain.costs.later] * (accumulation - 1)
    for mode, cost in zip(modes, chain.passes, strict=True):
        parts["recompute" if TERM_KINDS[mode] is TermKind.RECOMPUTE else "compute"] += cost.device_s
    parts["optimizer"] = chain.costs.update.device_s
    busy = sum(parts.values())
    exposed = _finish(chain, reduced, False) - float(chain.ends[-1]) if len(reduced) else 0.0
    parts["communication"] = max(min(exposed + gather_s, period_s - busy), 0.0)
    parts["host"] = max(period_s - busy - parts["communication"], 0.0)
    return parts
