"""Slack in a pipeline: stages that wait for the slowest can run at lower power without making the step longer (as in Perseus).

In the steady state of a pipeline every stage has the slowest stage's time for each micro-batch. A stage with less work can take up to
that long; what it draws less, at its own best cap, is saved. Perseus (Chung et al., SOSP 2024; recalled, not looked
up) calls the waste intrinsic bloat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtrain.core.errors import InputError
from simtrain.run.power_cap import CapLaw

_CAPS = 400


@dataclass(frozen=True, slots=True)
class SlackPlan:
    """Caps that use up the slack.

    Attributes:
        caps_w: Power each stage draws.
        times_s: Time of each stage under it; none above the slowest stage's.
        saved: Share of the energy saved in the steady state, without a longer step.
    """

    caps_w: tuple[float, ...]
    times_s: tuple[float, ...]
    saved: float


def use_slack(stage_times_s: Sequence[float], law: CapLaw, waiting_w: float) -> SlackPlan:
    """Finds for each stage the power that takes the least energy within the slowest stage's time.

    Filling and draining of the pipeline is not counted: it is a smaller share the more micro-batches there are.

    Args:
        stage_times_s: Busy time of each stage per micro-batch, forward and backward, at full power.
        law: Of the stages' devices.
        waiting_w: Power of a device that waits.

    Raises:
        InputError: No stages, times not above zero, or a waiting power outside of 0 and the law's demand.
    """
    times = np.asarray(stage_times_s, dtype=np.float64)
    if times.size == 0 or not (np.isfinite(times).all() and (times > 0).all()):
        raise InputError("give the time of at least one stage, each above zero")
    if not 0 <= waiting_w <= law.demand_w:
        raise InputError(f"the power of waiting must be between 0 and the {law.demand_w:g} W of working, not {waiting_w!r}")
    period_s = float(times.max())
    drawn = np.linspace(law.demand_w, law.static_w + 0.01 * (law.demand_w - law.static_w), _CAPS)
    stretched = times[:, None] * law.slowdown(drawn / law.reach)[None, :]
    energy = drawn * stretched + waiting_w * (period_s - stretched)
    energy[stretched > period_s * (1 + 1e-12)] = np.inf
    best = energy.argmin(axis=1)
    rows = np.arange(times.size)
    saved = 1 - float(energy[rows, best].sum() / energy[:, 0].sum())
    return SlackPlan(tuple(drawn[best].tolist()), tuple(stretched[rows, best].tolist()), saved)
