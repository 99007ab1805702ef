"""What would have to move for a strategy to fit."""

import simtrain as st
from simtrain.step.offload_hint import fitting_offload, offload_hint

STRATEGY = st.Strategy(micro_batch=1, precision="fp16-master", checkpoint="full")
BIG = {"layers": 12, "hidden": 5120, "heads": 40, "vocabulary": 2048, "seq_len": 512}


def test_the_least_that_fits_is_named_and_does_fit():
    gpt = st.workload("gpt", **BIG)
    assert not st.estimate(gpt, "dgx-2", STRATEGY).fits
    found = fitting_offload(gpt, "dgx-2", STRATEGY)
    assert found is not None
    assert found.offload == "optimizer"
    assert st.estimate(gpt, "dgx-2", found).fits
    said = offload_hint(gpt, "dgx-2", STRATEGY)
    assert said.startswith("offload=optimizer would fit")


def test_nothing_is_said_where_nothing_helps_or_the_host_is_not_known():
    gpt = st.workload("gpt", **BIG)
    assert offload_hint(gpt, "1x v100-sxm2-32gb", STRATEGY) == ""
    assert offload_hint(gpt, "dgx-2", STRATEGY.with_(micro_batch=4096)) == ""
