"""What frameworks keep beside the plain states: gradients between steps, temporaries of the update, shards in 16 bit."""

import pytest

import simtrain as st
from simtrain.core.runtimes import RUNTIMES
from simtrain.core.strategy import Strategy
from simtrain.step.layout import lay_out
from simtrain.step.setting import resolve
from simtrain.step.states import GROUP_ELEMENTS, optimizer_transients, persistent

EAGER = RUNTIMES["torch-eager"].with_(optimizer_style="fused")


def test_gradients_that_stay_between_steps_lie_beside_all_activations() -> None:
    """With one micro-batch they come on top of the peak; with several they are there anyway from the second on."""
    workload = st.workload("bert-large", seq_len=512)
    gradients = 4 * workload.parameter_count
    kept = EAGER.with_(keeps_gradients=True)
    for accumulation, more in ((1, gradients), (2, 0.0)):
        strategy = f"micro_batch=4,accumulation={accumulation},precision=fp32"
        peaks = [st.estimate(workload, "v100-sxm-32g", strategy, runtime=r).memory.allocated_bytes for r in (EAGER, kept)]
        assert peaks[1] - peaks[0] == pytest.approx(more, abs=0.02 * gradients)


def test_a_second_temporary_of_the_update_is_as_large_as_the_parameters() -> None:
    workload, strategy = st.workload("gpt2-small"), Strategy.parse("precision=fp32")
    settings = [resolve(workload, "a100", strategy, RUNTIMES["torch-eager"].with_(update_copies=n)) for n in (1, 2)]
    one, two = (optimizer_transients(s, lay_out(s).lanes[0]).sum() for s in settings)
    assert two - one == 4 * workload.parameter_count


def test_zero_3_of_deepspeed_keeps_16_bytes_a_parameter_over_all_ranks() -> None:
    """Rajbhandari et al. 2020, figure 1: (2 + 2 + 12) bytes over the ranks; the update widens gradients group by group."""
    workload = st.workload("llama2-7b")
    setting = resolve(workload, "dgx-a100", Strategy.parse("data=8,zero=3,precision=bf16-master"), "deepspeed")
    lane = lay_out(setting).lanes[0]
    parameters = sum(p.elements for chunk in lane.chunks for p in chunk.parameters)
    assert persistent(setting, lane).sum() == pytest.approx(16 * parameters / 8, rel=0.02)
    assert optimizer_transients(setting, lane).sum() == 4 * min(parameters / 8, GROUP_ELEMENTS)
