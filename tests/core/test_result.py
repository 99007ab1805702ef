import json

import numpy as np
import pytest

from simtrain.core.result import MemoryKind, MemoryReport, MemoryTimeline, Result, TraceEvent

GIB = 2**30


def _memory(device_gib=20.0):
    timeline = MemoryTimeline(("start", "peak"), np.ones((2, len(MemoryKind))), np.array([0.0, 0.1]))
    return MemoryReport(18 * GIB, 19 * GIB, device_gib * GIB, 24 * GIB, {"parameter": np.float64(18 * GIB)}, "peak", "all", timeline)


def _result(memory):
    return Result(
        *("gpt2-small", "4x rtx-3090", "data=4", "torch-eager", "schedule", memory.fits, 0.1, 640.0, 655360.0, 64, 4, 1e13, 0.35, 0.33),
        *({"compute": np.float64(0.09), "host": 0.01}, {"compute": 0.09}, memory, 100.0, 1000.0, 0.001, "compute", ("a",), ("b",)),
        events=(TraceEvent("f", "forward", "all", "compute", 0.0, 0.09, 0),),
    )


def test_as_plain_data_it_is_json_with_its_own_field_names():
    data = json.loads(json.dumps(_result(_memory()).to_dict(), allow_nan=False))
    assert data.keys() == set(Result.__dataclass_fields__) - {"events"}
    assert data["memory"].keys() == set(MemoryReport.__dataclass_fields__) - {"timeline"} | {"fits", "over_bytes"}
    assert data["breakdown_s"] == {"compute": 0.09, "host": 0.01}


def test_what_is_over_the_capacity_does_not_fit():
    assert _memory(20).fits
    assert _memory(20).over_bytes == -4 * GIB
    assert _memory(24).fits
    assert not _memory(25).fits
    assert _memory(25).over_bytes == GIB


@pytest.mark.parametrize(("device_gib", "verdict"), [(20, "(fits)"), (30, "OUT OF MEMORY by 6.00 GiB")])
def test_the_summary_says_whether_it_fits(device_gib, verdict):
    text = str(_result(_memory(device_gib)))
    assert verdict in text
    assert "step 100 ms" in text
    assert "bound by compute" in text


def test_the_timeline_adds_up_kinds():
    assert np.array_equal(_memory().timeline.total_bytes, [len(MemoryKind)] * 2)
