"""Evidence: the nearest measured runs, of those whose step times say what hardware can do."""

import simtrain as st
from simtrain.core.strategy import Strategy
from simtrain.planner.evidence import distance, traits
from validation.layouts import LAYOUT_SETS, load_layouts
from validation.nearest import nearest_layouts


def test_the_nearest_come_first_and_functional_tests_are_no_evidence_of_time():
    asked = traits(st.workload("gpt2-small"), st.cluster("4x rtx-3090"), Strategy.parse("data=4,micro_batch=16,precision=bf16-amp"))
    found = nearest_layouts(asked, 8)
    assert len(found) == 8
    assert [n.distance for n in found] == sorted(n.distance for n in found)
    assert not any("megatron_reference" in n.name for n in found)
    assert distance(asked, asked) == (0.0, ())


def test_only_sources_that_say_so_are_left_out():
    assert [name for name in LAYOUT_SETS if not load_layouts(name).timed] == ["megatron_reference"]
