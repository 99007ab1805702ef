import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

from simtrain import report
from simtrain.core.errors import InputError
from simtrain.core.result import MemoryKind
from simtrain.core.units import format_bytes
from simtrain.report.plots import MEMORY_COLOURS

GIB = 2**30


def _texts(ax):
    return [t.get_text() for t in ax.texts]


def _legend(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def test_every_kind_of_memory_has_a_colour_of_its_own():
    assert MEMORY_COLOURS.keys() == set(MemoryKind)
    assert len(set(MEMORY_COLOURS.values())) == len(MemoryKind)


def test_memory_stacks_the_kinds_that_are_used(result):
    ax = report.plot_memory(result)
    used = [k for i, k in enumerate(MemoryKind) if result.memory.timeline.bytes_by_kind[:, i].any()]
    assert len(ax.collections) == len(used)
    assert set(_legend(ax)) >= {k.value for k in used}
    assert ax.get_ylabel() == "memory (GiB)"
    assert ax.get_xlabel() == "time in the step (ms)"
    top = max(c.get_paths()[0].vertices[:, 1].max() for c in ax.collections)
    assert top == pytest.approx(result.memory.allocated_bytes / GIB)


def test_the_annotated_peak_is_what_the_report_allocates(result):
    ax = report.plot_memory(result)
    (annotation,) = ax.texts
    assert annotation.get_text() == f"peak {format_bytes(result.memory.allocated_bytes)}\n{result.memory.peak_moment}"
    assert annotation.xy[1] * GIB == pytest.approx(result.memory.allocated_bytes)
    peak = result.memory.timeline.total_bytes.argmax()
    assert annotation.xy[0] == pytest.approx(result.memory.timeline.time_s[peak] * 1e3)


@pytest.mark.parametrize(("capacity_gib", "inside"), [(24, True), (800, False)])
def test_the_capacity_is_a_line_or_named_where_it_would_dwarf_the_rest(result, capacity_gib, inside):
    large = dataclasses.replace(result, memory=dataclasses.replace(result.memory, capacity_bytes=capacity_gib * GIB))
    ax = report.plot_memory(large)
    assert bool(ax.get_ylim()[1] > capacity_gib) == inside
    assert any(label.startswith(f"capacity {format_bytes(capacity_gib * GIB)}") for label in _legend(ax))


def test_evenly_spaced_moments_are_an_order_and_no_times(result):
    timeline = result.memory.timeline
    even = dataclasses.replace(timeline, time_s=np.linspace(0, 1, len(timeline.moments)))
    ax = report.plot_memory(dataclasses.replace(result, memory=dataclasses.replace(result.memory, timeline=even)))
    assert "order" in ax.get_xlabel()


def test_the_timeline_has_a_row_per_stream_and_a_legend_per_category(result):
    ax = report.plot_timeline(result)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["host", "compute", "communication"]
    assert _legend(ax) == ["host", "forward", "backward", "collective", "optimizer"]
    assert ax.get_xlabel().startswith("time (ms)")
    assert ax.get_xlim()[1] == pytest.approx(result.step_time_s * 1e3)


def test_the_timeline_merges_layers_of_a_micro_batch_and_numbers_it(result):
    ax = report.plot_timeline(result)
    bars = sum(len(c.get_paths()) for c in ax.collections)
    assert len(result.events) > 100
    assert bars < 25
    assert sorted(_texts(ax)) == sorted([str(i) for i in range(4)] * 3), "host, forward and backward of four micro-batches"


def test_rank_classes_are_named_when_there_are_several(result):
    other = tuple(dataclasses.replace(e, rank_class="slow") for e in result.events)
    ax = report.plot_timeline(dataclasses.replace(result, events=result.events + other))
    assert [t.get_text() for t in ax.get_yticklabels()][-1] == "slow: communication"


def test_of_many_rank_classes_the_slowest_and_the_fastest_are_shown(result):
    events = tuple(
        dataclasses.replace(e, rank_class=f"rank {rank}", duration_s=e.duration_s * (1 + rank / 100))
        for rank in range(40)
        for e in result.events
    )
    ax = report.plot_timeline(dataclasses.replace(result, events=events))
    shown = {t.get_text().partition(":")[0] for t in ax.get_yticklabels()}
    assert shown == {f"rank {rank}" for rank in (0, 1, 2, 3, 36, 37, 38, 39)}
    assert "32 rank classes between the slowest and the fastest are left out" in ax.get_xlabel()


def test_a_long_time_without_moments_is_hatched_and_explained(result):
    timeline = result.memory.timeline
    later = np.where(np.arange(len(timeline.moments)) > 50, timeline.time_s + 1.0, timeline.time_s)
    moments = tuple(f"1/{m}" for m in timeline.moments)
    memory = dataclasses.replace(result.memory, timeline=dataclasses.replace(timeline, time_s=later, moments=moments))
    ax = report.plot_memory(dataclasses.replace(result, memory=memory, strategy="accumulation=8"))
    assert "repeats micro-batch 1" in _texts(ax)
    ax = report.plot_memory(dataclasses.replace(result, memory=memory, strategy="accumulation=2"))
    assert "repeats micro-batch 1" not in _texts(ax), "the last one stands for no other"
    assert "repeats micro-batch 1" not in _texts(report.plot_memory(result))


def test_categories_without_a_colour_of_their_own_are_drawn_and_named(result):
    odd = dataclasses.replace(result.events[0], category="snapshot")
    assert "snapshot" in _legend(report.plot_timeline(dataclasses.replace(result, events=(odd,))))


def test_the_breakdown_is_one_bar_per_result_as_long_as_the_step(result):
    other = dataclasses.replace(result, strategy="data=4,zero=1", breakdown_s={"compute": 0.1, "new part": 0.1}, step_time_s=0.2)
    ax = report.plot_breakdown([result, other])
    ends = [max(p.get_x() + p.get_width() for p in ax.patches if round(p.get_y() + p.get_height() / 2) == i) for i in range(2)]
    assert ends == pytest.approx([result.step_time_s * 1e3, 200])
    assert _legend(ax) == ["compute", "optimizer", "communication", "host", "new part"]
    assert len(ax.get_yticklabels()) == 2


def test_one_result_is_a_breakdown_too_and_no_result_is_refused(result):
    assert len(report.plot_breakdown(result).get_yticklabels()) == 1
    with pytest.raises(InputError, match="at least one result"):
        report.plot_breakdown([])


def test_bars_are_named_by_what_differs(result):
    labels = [t.get_text() for t in report.plot_breakdown([result, dataclasses.replace(result, cluster="dgx-h100")]).get_yticklabels()]
    assert labels[1].startswith("dgx-h100, ")


@pytest.mark.parametrize("plot", [report.plot_memory, report.plot_timeline, report.plot_breakdown])
def test_plots_draw_on_the_axes_they_are_given(plot, result):
    ax = plt.figure().subplots()
    assert plot(result, ax) is ax
    assert ax.has_data()
    ax.figure.canvas.draw()


def test_a_reader_that_keeps_no_timeline_is_named(result):
    bare = dataclasses.replace(result, reader="estimate", events=(), memory=dataclasses.replace(result.memory, timeline=None))
    with pytest.raises(InputError, match="'estimate' keeps no memory timeline"):
        report.plot_memory(bare)
    with pytest.raises(InputError, match="'estimate' keeps no events"):
        report.plot_timeline(bare)
