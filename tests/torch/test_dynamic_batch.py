import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import simtrain as st
from simtrain.core.errors import InputError, UnsupportedError
from simtrain.run.batch_policy import BatchPolicy, StepPrice
from simtrain.run.learning_rate import LearningRate
from simtrain.run.noise_scale import NoiseAverage
from simtrain.torch.gradient_norms import GradientNorms, adam_weights

loss_function = nn.functional.mse_loss


def problem(samples=256, seed=0):
    torch.manual_seed(seed)
    inputs = torch.randn(samples, 6)
    targets = inputs.sum(1, keepdim=True) + torch.randn(samples, 1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), inputs, targets


def per_sample_gradients(model, inputs, targets):
    """Every sample's gradient, one row each, by torch.func."""
    parameters = dict(model.named_parameters())

    def loss(values, x, y):
        return loss_function(torch.func.functional_call(model, values, (x[None],)), y[None])

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    return torch.cat([rows[name].flatten(1) for name in parameters], dim=1).detach()


def exact(rows):
    """Squared norm of the mean and trace of the covariance, over all samples."""
    mean = rows.mean(0)
    return float(mean.square().sum()), float((rows - mean).square().sum(1).mean())


def run(dynamic, model, inputs, targets, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    while dynamic.steps < steps:
        chosen = torch.randint(len(inputs), (dynamic.choice.micro_batch,), generator=generator)
        samples.append(chosen)
        with dynamic.micro_batch(len(chosen)):
            dynamic.backward(loss_function(model(inputs[chosen]), targets[chosen]))
        dynamic.step()
    return samples


class Kept(NoiseAverage):
    """Keeps what it averages."""

    def __init__(self, decay):
        super().__init__(decay)
        self.samples = []

    def add(self, sample):
        self.samples.append(sample)
        super().add(sample)


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 2), (2, 6)])
def test_noise_is_unbiased_against_the_exact_per_sample_covariance(micro_batch, accumulation):
    model, inputs, targets = problem()
    signal, noise = exact(per_sample_gradients(model, inputs, targets))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the model stays where it is
    dynamic = st.torch.DynamicBatch(
        model, optimizer, micro_batch, accumulation=accumulation, policy=BatchPolicy((micro_batch,), dwell_steps=10**9), every=1, decay=1.0
    )
    dynamic.average = Kept(decay=1.0)
    run(dynamic, model, inputs, targets, 600)
    samples = dynamic.average.samples
    for found, truth in (([s.trace for s in samples], noise), ([s.gradient_sqr for s in samples], signal)):
        values = torch.tensor(found)
        assert abs(float(values.mean()) - truth) < 3 * float(values.std()) / math.sqrt(len(values))


def test_hooks_see_what_a_copy_would_and_touch_nothing():
    model, inputs, targets = problem()
    norms, whole, parts = GradientNorms(model.parameters()), [], 0.0
    norms.start()
    for i in range(4):
        loss_function(model(inputs[8 * i : 8 * i + 8]), targets[8 * i : 8 * i + 8]).backward()
    norms.stop()
    for i in range(4):
        grads = torch.autograd.grad(loss_function(model(inputs[8 * i : 8 * i + 8]), targets[8 * i : 8 * i + 8]), list(model.parameters()))
        parts += float(sum(g.square().sum() for g in grads))
        whole.append(torch.cat([g.flatten() for g in grads]))
    assert float(norms.total()) == pytest.approx(parts, rel=1e-5)
    assert float(norms.of_gradients()) == pytest.approx(float(sum(whole).square().sum()), rel=1e-5)
    before = float(norms.total())
    loss_function(model(inputs), targets).backward()
    assert float(norms.total()) == before


def test_a_tied_parameter_counts_once_with_its_whole_gradient():
    weight = nn.Parameter(torch.tensor([2.0]))
    norms = GradientNorms([weight])
    norms.start()
    (weight * 3 + weight**2).backward()
    assert float(norms.total()) == (3 + 4) ** 2


def test_preconditioned_noise_divides_by_what_adam_divides_by():
    model, inputs, targets = problem()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss_function(model(inputs), targets).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    weights = adam_weights(optimizer)
    for parameter, old in zip(model.parameters(), before, strict=True):
        state = optimizer.state[parameter]
        step = 1e-3 * state["exp_avg"] / (1 - 0.9**5) / weights(parameter)
        torch.testing.assert_close(old - parameter, step, rtol=1e-3, atol=1e-7)
    rows = per_sample_gradients(model, inputs, targets) / torch.cat([weights(p).flatten() for p in model.parameters()])
    norms, total, number = GradientNorms(model.parameters(), weights), 0.0, 64
    for i in range(number):
        norms.start()
        loss_function(model(inputs[4 * i : 4 * i + 4]), targets[4 * i : 4 * i + 4]).backward()
        norms.stop()
        total += float(norms.total()) / number
    assert total == pytest.approx(float(rows.view(number, 4, -1).mean(1).square().sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
def test_training_equals_a_plain_loop_over_the_same_batches(optimizer_type):
    model, inputs, targets = problem()
    other, _, _ = problem()
    dynamic = st.torch.DynamicBatch(
        model, optimizer_type(model.parameters(), lr=0.01), 4, accumulation=3, policy=BatchPolicy((4,), dwell_steps=10**9), every=2
    )
    drawn = run(dynamic, model, inputs, targets, 12)
    plain = optimizer_type(other.parameters(), lr=0.01)
    for step in range(12):
        chosen = torch.cat(drawn[3 * step : 3 * step + 3])
        plain.zero_grad()
        loss_function(other(inputs[chosen]), targets[chosen]).backward()
        plain.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def adapting(model, steps_policy=20, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    policy = BatchPolicy((8,), max_accumulation=16, dwell_steps=steps_policy)
    return st.torch.DynamicBatch(model, optimizer, 8, policy=policy, price=StepPrice(1.0, 0.01, 0.01), every=2, **options), optimizer


def test_batch_and_learning_rate_grow_with_the_noise_in_an_ordinary_loop():
    model, inputs, targets = problem(2048)
    dynamic, optimizer = adapting(model, learning_rate=LearningRate(8, warmup_steps=5))
    loader = DataLoader(TensorDataset(inputs, targets), batch_sampler=dynamic.batch_sampler(RandomSampler(inputs)))
    assert dynamic.noise is None
    for _ in range(4):
        for x, y in loader:
            with dynamic.micro_batch(len(x)):
                dynamic.backward(loss_function(model(x), y))
            dynamic.step()
    assert dynamic.choice.accumulation > 4
    assert dynamic.noise.samples > 100
    assert 0.02 < optimizer.param_groups[0]["lr"] < 0.02 * 16
    assert dynamic.progress_steps > dynamic.steps


def test_a_restored_run_goes_on_as_if_nothing_had_happened():
    model, inputs, targets = problem()
    dynamic, optimizer = adapting(model)
    run(dynamic, model, inputs, targets, 61)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), dynamic.state_dict()), buffer)
    run(dynamic, model, inputs, targets, 130, seed=2)
    buffer.seek(0)
    other, _, _ = problem(seed=5)
    again, other_optimizer = adapting(other)
    for target, state in zip((other, other_optimizer, again), torch.load(buffer, weights_only=True), strict=True):
        target.load_state_dict(state)
    assert again.choice.accumulation > 1
    run(again, other, inputs, targets, 130, seed=2)
    assert again.state_dict() == {**dynamic.state_dict(), "measured_price": again.state_dict()["measured_price"]}
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=0, atol=0)


def test_a_scaler_leaves_the_noise_scale_and_skips_overflows():
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, inputs, targets = problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        dynamic = st.torch.DynamicBatch(
            model, optimizer, 4, accumulation=2, scaler=scaler, every=1, policy=BatchPolicy((4,), dwell_steps=999)
        )
        run(dynamic, model, inputs, targets, 20)
        results.append((dynamic.average.trace, dynamic.average.gradient_sqr, *model[0].weight.detach().flatten().tolist()))
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    progress, before, seen = dynamic.progress_steps, model[0].weight.detach().clone(), dynamic.average.count
    with dynamic.micro_batch(4):
        dynamic.backward(model(inputs[:4]).sum() * math.inf)
    with dynamic.micro_batch(4):
        dynamic.backward(model(inputs[:4]).sum())
    assert dynamic.step()
    assert dynamic.progress_steps == progress
    assert dynamic.average.count == seen
    assert torch.equal(before, model[0].weight)


def test_micro_batches_of_another_size_are_weighted_by_their_samples():
    model, inputs, targets = problem()
    other, _, _ = problem()
    dynamic = st.torch.DynamicBatch(
        model, torch.optim.SGD(model.parameters(), lr=0.1), 8, accumulation=2, learning_rate=LearningRate(16, scaling="none")
    )
    for part in (slice(0, 8), slice(8, 11)):
        with dynamic.micro_batch(part.stop - part.start):
            dynamic.backward(loss_function(model(inputs[part]), targets[part]))
    assert dynamic.step()
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_function(other(inputs[:11]), targets[:11]).backward()
    plain.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


def test_clipping_is_that_of_pytorch():
    model, inputs, targets = problem()
    other, _, _ = problem()
    dynamic = st.torch.DynamicBatch(model, torch.optim.SGD(model.parameters(), lr=0.1), 8, max_norm=0.01)
    with dynamic.micro_batch(8):
        dynamic.backward(loss_function(model(inputs[:8]), targets[:8]))
    dynamic.step()
    loss_function(other(inputs[:8]), targets[:8]).backward()
    nn.utils.clip_grad_norm_(other.parameters(), 0.01)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


def test_wrong_use_is_named():
    model, inputs, targets = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="micro-batches 4, up to 64"):
        st.torch.DynamicBatch(model, optimizer, 8, policy=BatchPolicy((4,)))
    with pytest.raises(InputError, match="every"):
        st.torch.DynamicBatch(model, optimizer, 8, every=0)
    dynamic = st.torch.DynamicBatch(model, optimizer, 8, accumulation=2)
    with pytest.raises(InputError, match="inside `with dynamic"):
        dynamic.backward(torch.zeros(()))
    with dynamic.micro_batch():
        dynamic.backward(loss_function(model(inputs[:8]), targets[:8]))
    assert not dynamic.step()
    with pytest.raises(InputError, match="after step"):
        dynamic.state_dict()
    with dynamic.micro_batch():
        dynamic.backward(loss_function(model(inputs[:8]), targets[:8]))
    with pytest.raises(InputError, match="call step"), dynamic.micro_batch():
        pass
    table = nn.Embedding(4, 2, sparse=True)
    norms = GradientNorms(table.parameters())
    norms.start()
    with pytest.raises(UnsupportedError, match="sparse"):
        table(torch.tensor([1])).sum().backward()


def test_two_ranks_under_ddp_decide_alike_and_measure_local_against_averaged_gradients(tmp_path):
    worker, meeting = str(Path(__file__).with_name("dynamic_batch_ranks.py")), str(tmp_path / "meeting")
    ranks = [subprocess.Popen([sys.executable, worker, str(r), meeting], stderr=subprocess.PIPE, text=True) for r in range(2)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-3000:]
