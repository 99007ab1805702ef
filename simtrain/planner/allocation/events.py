"""When replicas finish: one-forward-one-backward pipelines with transfers that may block, many templates at once.

The order is that of DeepSpeed's training schedule: in every slot a stage runs a forward or a backward pass, in turn; before it, it
exchanges with the neighbour that it hands work to. With rendezvous transfers both ends are busy meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtrain.core.polynomial import FloatArray
from simtrain.planner.allocation.prices import Market, Template, Transfers


@dataclass(frozen=True, slots=True, eq=False)
class Pipelines:
    """Templates with equally many stages, one row each.

    Attributes:
        forward_s: Of each stage.
        backward_s: Of each stage.
        send_s: Of one transfer behind each stage but the last (activation or gradient: the sizes are equal).
        update_s: Slowest optimizer.
    """

    forward_s: FloatArray
    backward_s: FloatArray
    send_s: FloatArray
    update_s: FloatArray


def pipelines(market: Market, templates: Sequence[Template]) -> Pipelines:
    """Prices templates with equally many stages."""
    forward, backward, update = (np.zeros((len(templates), len(templates[0].stages))) for _ in range(3))
    send = np.zeros((len(templates), max(len(templates[0].stages) - 1, 0)))
    for row, template in enumerate(templates):
        for s, stage in enumerate(template.stages):
            price = market.prices[stage.unit, template.micro_batch]
            own = slice(stage.start, stage.end)
            forward[row, s], backward[row, s] = price.forward_s[own].sum(), price.backward_s[own].sum()
            update[row, s] = price.update_s[own].sum()
        send[row] = market.sends_s([stage.unit for stage in template.stages], template.micro_batch)
    return Pipelines(forward, backward, send, update.max(axis=1))


def finish_s(lines: Pipelines, micro_batches: int, transfers: Transfers) -> FloatArray:
    """When the last stage to finish has made its gradients, by event.

    Args:
        lines: Templates.
        micro_batches: Of each replica.
        transfers: Who waits while something moves.
    """
    stages = lines.forward_s.shape[1]
    now = np.zeros_like(lines.forward_s)
    for slot in range(2 * (micro_batches + stages - 1)):
        before = now.copy()
        for s in range(1 - slot % 2, stages - 1, 2):  # stage s is about to run backward, s + 1 forward
            down, up = _valid((slot - s - 1) // 2, micro_batches), _valid((slot + s + 1) // 2 - stages, micro_batches)
            wait = lines.send_s[:, s]
            if not (down or up):
                continue
            if transfers == "rendezvous":
                now[:, s] = now[:, s + 1] = np.maximum(now[:, s], now[:, s + 1]) + (down + up) * wait
                continue
            # what was sent left when the sender had computed; a blocked sender goes on once it has left
            held = wait if transfers == "sender" else 0.0
            now[:, s] = np.maximum(before[:, s] + down * held, before[:, s + 1] + wait) if up else before[:, s] + held
            now[:, s + 1] = np.maximum(before[:, s + 1] + up * held, before[:, s] + wait) if down else before[:, s + 1] + held
        for s in range(stages):
            forward = (s + slot) % 2 == 0
            micro_batch = (slot - s) // 2 if forward else (slot + s + 1) // 2 - stages
            if _valid(micro_batch, micro_batches):
                now[:, s] += (lines.forward_s if forward else lines.backward_s)[:, s]
    return np.asarray(now.max(axis=1))


def _valid(micro_batch: int, count: int) -> bool:
    return 0 <= micro_batch < count


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """Finishing times as `fill_s + period_s x micro-batches`, update included: exact from twice as many micro-batches as stages on.

    Attributes:
        fill_s: Constant part of each template.
        period_s: Part for each micro-batch.
    """

    fill_s: FloatArray
    period_s: FloatArray


def affine(market: Market, templates: Sequence[Template]) -> Affine:
    """Fits the finishing time of each template through two simulated numbers of micro-batches."""
    fill, period = np.zeros(len(templates)), np.zeros(len(templates))
    by_length: dict[int, list[int]] = {}
    for i, template in enumerate(templates):
        by_length.setdefault(len(template.stages), []).append(i)
    for stages, rows in by_length.items():
        lines = pipelines(market, [templates[i] for i in rows])
        few, more = 2 * stages, 4 * stages
        early, late = (finish_s(lines, m, market.transfers) for m in (few, more))
        period[rows] = (late - early) / (more - few)
        fill[rows] = early - period[rows] * few + lines.update_s
    return Affine(fill, period)


def replica_s(market: Market, template: Template, micro_batches: int) -> float:
    """When a replica has made its gradients and updated, by event."""
    lines = pipelines(market, [template])
    return float(finish_s(lines, micro_batches, market.transfers)[0] + lines.update_s[0])
