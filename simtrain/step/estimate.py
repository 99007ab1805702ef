"""`estimate`: the same costs as `schedule`, composed in closed form.

The device runs passes in order: pass i cannot start before the host has issued enough of it, so the end of pass j is
`C[j+1] + max(0, max over i <= j of (issue[i] + lead[i] - C[i]))` with C the running sum of device times. Buckets reduce in order after
the pass that fills them, `f[b] = max(f[b-1], ready[b]) + c[b]`, which is the same form. Without a synchronisation the host runs ahead
across steps, and the period is the larger of what the host needs and what the device needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import TermKind
from simtrain.core.result import Result
from simtrain.step.breakdown import PARTS
from simtrain.step.costs import TERM_KINDS, PassCost
from simtrain.step.lower import StepCosts, bucket_cells, collectives, rank_classes, step_costs
from simtrain.step.results import assemble, memory_report
from simtrain.step.setting import Setting

NOTE = "closed form: hosts and devices are composed per step, transients between steps are left out"


def in_order(ready_s: FloatArray, durations_s: FloatArray) -> FloatArray:
    """Ends of jobs that run one after the other, none before it is ready: `end[j] = max(end[j-1], ready[j]) + t[j]`, from time 0."""
    before = np.concatenate([[0.0], np.cumsum(durations_s)])
    return np.asarray(before[1:] + np.maximum.accumulate(np.maximum(ready_s - before[:-1], 0.0)), dtype=np.float64)


def estimate_setting(setting: Setting) -> Result:
    """Predicts a step in closed form."""
    buckets, reductions, gather = collectives(setting)
    classes = rank_classes(setting, split=False)
    costs = [step_costs(setting, c.device, buckets) for c in classes]
    gather_s = gather.time_s if gather else 0.0
    synchronised = setting.precision.loss_scaling and setting.runtime.run_ahead_launches > 0
    flats = [_flat(c, setting.strategy.accumulation) for c in costs]
    ends = [_ends(flat, c.update, synchronised) for flat, c in zip(flats, costs, strict=True)]
    cells = bucket_cells(costs[0], buckets)
    reduced = np.zeros(0)
    if buckets:
        overlap = setting.runtime.overlap_communication
        ready = np.max([[end[cell if overlap else -1] for cell in cells] for end in ends], axis=0)
        reduced = in_order(ready, np.array([r.time_s for r in reductions]))
    periods = [_period(c, flat, end, reduced, gather_s, synchronised) for c, flat, end in zip(costs, flats, ends, strict=True)]
    slowest = int(np.argmax(periods))
    period = periods[slowest]
    parts = _breakdown(costs[slowest], flats[slowest], setting.strategy.accumulation, period, reduced, gather_s, synchronised)
    compute_s = sum(parts[p] for p in ("compute", "recompute", "optimizer")) + sum(c.device_s for c in costs[slowest].copy_back)
    busy = {"compute": compute_s, "communication": sum(r.time_s for r in reductions) + gather_s}
    if setting.runtime.run_ahead_launches > 0:
        busy["host"] = _host_s(costs[slowest], flats[slowest])
    return assemble(setting, "estimate", period, parts, busy, memory_report(setting), notes=(NOTE,))


def _flat(costs: StepCosts, accumulation: int) -> list[PassCost]:
    if accumulation == 1:
        return list(costs.last)
    return [*costs.costs[0], *(list(costs.costs[1]) * (accumulation - 2)), *costs.last]


def _ends(flat: Sequence[PassCost], update: PassCost, synchronised: bool) -> FloatArray:
    """End of each pass; with a synchronisation the clock starts when the host resumes and issues the optimizer first."""
    sequence = [update, *flat] if synchronised else list(flat)
    device = np.array([c.device_s for c in sequence])
    if not synchronised:
        return np.cumsum(device)
    issued = np.concatenate([[0.0], np.cumsum([c.host_s for c in sequence])])[:-1]
    return in_order(issued + np.array([c.lead_s for c in sequence]), device)[1:]


def _after_reduction(costs: StepCosts, end: float, reduced: FloatArray) -> float:
    if not len(reduced):
        return end
    if not costs.copy_back:
        return max(end, float(reduced[-1]))
    copies = np.array([c.device_s for c in costs.copy_back])
    return float(in_order(np.maximum(reduced, end), copies)[-1])


def _period(
    costs: StepCosts, flat: Sequence[PassCost], ends: FloatArray, reduced: FloatArray, gather_s: float, synchronised: bool
) -> float:
    device_s = _after_reduction(costs, float(ends[-1]), reduced)
    if synchronised:
        return device_s + gather_s
    return max(device_s + costs.update.device_s + gather_s, _host_s(costs, flat))


def _host_s(costs: StepCosts, flat: Sequence[PassCost]) -> float:
    return sum(c.host_s for c in (*flat, *costs.copy_back, costs.update))


def _breakdown(
    costs: StepCosts,
    flat: Sequence[PassCost],
    accumulation: int,
    period_s: float,
    reduced: FloatArray,
    gather_s: float,
    synchronised: bool,
) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    modes = [p.mode for p in costs.first] + [p.mode for p in costs.later] * (accumulation - 1)
    for mode, cost in zip(modes, flat, strict=True):
        parts["recompute" if TERM_KINDS[mode] is TermKind.RECOMPUTE else "compute"] += cost.device_s
    parts["optimizer"] = costs.update.device_s
    busy = sum(parts.values())
    exposed = 0.0
    if len(reduced):
        end = float(_ends(flat, costs.update, synchronised)[-1])
        exposed = _after_reduction(costs, end, reduced) - end
    parts["communication"] = max(min(exposed + gather_s, period_s - busy), 0.0)
    parts["host"] = max(period_s - busy - parts["communication"], 0.0)
    return parts
