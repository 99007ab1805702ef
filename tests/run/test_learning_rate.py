import math

import pytest
from hypothesis import given
from hypothesis import strategies as strategy

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.run.batch_law import gain
from simtrain.run.learning_rate import LearningRate


def test_warm_up_is_linear_and_cosine_ends_at_its_share():
    rate = LearningRate(32, total_steps=110, warmup_steps=10, final=0.1)
    assert [rate.shape(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rate.shape(10) == 1
    assert rate.shape(60) == pytest.approx(0.55)
    assert rate.shape(110) == rate.shape(500) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0, 7])
def test_the_schedule_equals_pytorchs(warmup):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50 - warmup, eta_min=0.2)
    rate = LearningRate(1, total_steps=50, warmup_steps=warmup, final=0.2)
    for step in range(warmup, 50):
        assert rate.shape(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()


def test_rules_follow_the_batch():
    assert LearningRate(32, scaling="linear").gain(128) == 4
    assert LearningRate(32, scaling="square-root").gain(128) == 2
    assert LearningRate(32, scaling="none").gain(128) == 1
    assert LearningRate(32, scaling="square-root").advance(128) == 4


@given(scale=strategy.floats(1, 1000), phi=strategy.floats(0, 1e6))
def test_adascale_lies_between_one_and_linear_and_equals_the_law(scale, phi):
    worth = gain(32 * scale, 32, 32 * phi)
    assert 1 - 1e-9 <= worth <= scale * (1 + 1e-9)
    assert worth == pytest.approx((1 + phi) / (1 + phi / scale))  # steps at the base batch over steps at this one


def test_adascale_at_its_limits():
    assert gain(64, 32, math.inf) == 2
    assert gain(64, 32, 0.0) == 1
    assert gain(64, 32, None) == 1
    assert gain(16, 32, None) == 0.5


def test_what_no_schedule_can_be_is_refused():
    with pytest.raises(UnknownNameError, match="adascale"):
        LearningRate(32, scaling="adascal")
    with pytest.raises(InputError, match="does not fit"):
        LearningRate(32, total_steps=10, warmup_steps=10)
    with pytest.raises(InputError, match="base_batch"):
        LearningRate(0)
    with pytest.raises(InputError, match="final"):
        LearningRate(1, final=2)
