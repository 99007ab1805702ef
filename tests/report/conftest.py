"""A result made by hand: four micro-batches of twelve layers on one rank class, reduced in buckets, with a full memory timeline."""

import dataclasses

import matplotlib as mpl
import numpy as np
import pytest

from simtrain.core.result import MemoryKind, MemoryReport, MemoryTimeline, Result, TraceEvent

mpl.use("Agg")

GIB = 2**30
LAYERS, MICRO_BATCHES = 12, 4
FORWARD_S, BACKWARD_S, REDUCE_S, OPTIMIZER_S = 1.0e-3, 2.0e-3, 1.5e-3, 4.0e-3


def _events():
    events = []
    device_s = communication_s = host_s = 0.0

    def run(name, category, stream, start_s, duration_s, micro_batch):
        events.append(TraceEvent(name, category, "all ranks", stream, start_s, duration_s, micro_batch))
        return start_s + duration_s

    for mb in range(MICRO_BATCHES):
        for direction, each_s in (("forward", FORWARD_S), ("backward", BACKWARD_S)):
            for layer in range(LAYERS):
                host_s = run(f"issue {direction} {layer}", "host", "host", host_s, 0.4e-3, mb)
                device_s = run(f"{direction} {layer}", direction, "compute", max(device_s, host_s), each_s, mb)
                if mb == MICRO_BATCHES - 1 and direction == "backward" and layer % 3 == 2:
                    communication_s = max(communication_s, device_s)
                    communication_s = run(f"bucket {layer // 3}", "collective", "communication", communication_s, REDUCE_S, -1)
    end_s = run("adamw", "optimizer", "compute", max(device_s, communication_s), OPTIMIZER_S, -1)
    return tuple(events), end_s


def _timeline(period_s):
    kinds = list(MemoryKind)
    rows, moments = [], []

    def at(moment, **sizes_gib):
        row = np.zeros(len(kinds))
        sizes = {"parameter": 0.46, "optimizer": 0.93, "gradient": 0.46, "cast": 0.23, "rounding": 0.02} | sizes_gib
        for kind, size in sizes.items():
            row[kinds.index(MemoryKind(kind))] = size * GIB
        rows.append(row)
        moments.append(moment)

    for mb in range(MICRO_BATCHES):
        for layer in range(LAYERS):
            at(f"micro-batch {mb}, forward of layer {layer}", activation=0.3 * (layer + 1), transient=0.2)
        at(f"micro-batch {mb}, loss", activation=0.3 * LAYERS, logits=1.5)
        for layer in reversed(range(LAYERS)):
            at(f"micro-batch {mb}, backward of layer {layer}", activation=0.3 * (layer + 1), transient=0.4)
    at("optimizer", transient=0.9)
    # Uneven on purpose: evenly spaced moments would mean that times are not known.
    time_s = np.linspace(0, 1, len(rows)) ** 1.1 * period_s
    return MemoryTimeline(tuple(moments), np.array(rows), time_s)


def make_result(**changes):
    events, period_s = _events()
    timeline = _timeline(period_s)
    peak = int(np.argmax(timeline.total_bytes))
    allocated = float(timeline.total_bytes[peak])
    memory = MemoryReport(
        allocated_bytes=allocated,
        reserved_bytes=allocated * 1.05,
        device_bytes=allocated * 1.05 + 0.44 * GIB,
        capacity_bytes=24 * GIB,
        by_kind_bytes={k.value: float(v) for k, v in zip(MemoryKind, timeline.bytes_by_kind[peak], strict=True)},
        peak_moment=timeline.moments[peak],
        rank_class="all ranks",
        timeline=timeline,
    )
    compute_s = MICRO_BATCHES * LAYERS * (FORWARD_S + BACKWARD_S)
    host_s = 0.4e-3
    breakdown = {"compute": compute_s, "optimizer": OPTIMIZER_S, "host": host_s}
    breakdown["communication"] = period_s - sum(breakdown.values())
    result = Result(
        workload="gpt2-small",
        cluster="4x rtx-3090",
        strategy="data=4,micro_batch=4,accumulation=4,precision=fp16-amp",
        runtime="torch-eager",
        reader="schedule",
        fits=True,
        step_time_s=period_s,
        samples_per_s=64 / period_s,
        tokens_per_s=64 * 1024 / period_s,
        global_batch=64,
        devices=4,
        model_flops=5.5e13,
        mfu=0.312,
        mfu_causal=0.298,
        breakdown_s=breakdown,
        busy_s={"compute": compute_s + OPTIMIZER_S, "host": MICRO_BATCHES * LAYERS * 2 * 0.4e-3, "communication": 4 * REDUCE_S},
        memory=memory,
        energy_j=210.5,
        power_w=1380.0,
        cost_usd=0.0,
        bound_by="compute",
        assumptions=("host power not counted",),
        sources=("a formula, 2020",),
        events=events,
    )
    return dataclasses.replace(result, **changes)


@pytest.fixture
def result():
    return make_result()


@pytest.fixture
def too_large():
    memory = make_result().memory
    return make_result(fits=False, memory=dataclasses.replace(memory, device_bytes=30 * GIB, capacity_bytes=24 * GIB))


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")
