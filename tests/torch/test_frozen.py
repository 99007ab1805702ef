"""Frozen parameters are held and read, and cost no gradient, no state, no update and no reduction."""

import pytest

import simtrain as st
from simtrain.core.errors import UnsupportedError
from tests.torch.small_models import adapted_gpt
from tests.torch.test_capture_models import IDS


@pytest.fixture(scope="module")
def adapters() -> st.Workload:
    return st.torch.capture(adapted_gpt, IDS)


def sizes() -> tuple[int, int, int]:
    """Parameters, of which trained, in how many tensors."""
    parameters = list(adapted_gpt().parameters())
    trained = [p.numel() for p in parameters if p.requires_grad]
    return sum(p.numel() for p in parameters), sum(trained), len(trained)


def test_only_what_is_trained_has_states_and_gradients(adapters: st.Workload) -> None:
    every, trained, tensors = sizes()
    assert adapters.parameter_count == every
    assert sum(p.elements for layer in adapters for p in layer.trained) == trained
    kinds = st.schedule(adapters, "rtx-3090", "micro_batch=8,precision=fp32").memory.by_kind_bytes
    assert kinds["parameter"] == pytest.approx(4 * every, rel=1e-3)
    assert kinds["optimizer"] == 8 * trained + 4 * tensors
    assert kinds.get("gradient", 0) <= 4 * trained


def test_replicas_reduce_only_what_is_trained(adapters: st.Workload) -> None:
    _, trained, _ = sizes()
    timeline = st.schedule(adapters, "4x rtx-3090", "data=4,micro_batch=8,accumulation=2,precision=fp32").memory
    assert timeline.by_kind_bytes["communication"] == 4 * trained


@pytest.mark.parametrize("strategy", ["data=4,zero=1,accumulation=2", "data=2,accumulation=4,checkpoint=full", "zero=2,data=4"])
def test_readers_agree_on_it(adapters: st.Workload, strategy: str) -> None:
    how = st.Strategy.parse(f"{strategy},micro_batch=8,precision=bf16-amp")
    schedule, simulation = (read(adapters, "4x rtx-3090", how).step_time_s for read in (st.schedule, st.simulate))
    assert simulation == pytest.approx(schedule, rel=1e-9)
    assert st.estimate(adapters, "4x rtx-3090", how).step_time_s == pytest.approx(schedule, rel=0.05)


def test_sharding_frozen_parameters_is_refused(adapters: st.Workload) -> None:
    with pytest.raises(UnsupportedError, match="sharding frozen parameters"):
        st.schedule(adapters, "4x rtx-3090", "data=4,zero=3")
