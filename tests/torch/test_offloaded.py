"""Activations moved away and back on real modules: the same gradients, each tensor once, as many bytes as predicted."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import simtrain as st
from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.step.layout import lay_out
from simtrain.step.offload_activations import movable_segments, saved_row
from simtrain.step.setting import resolve
from simtrain.torch.offloaded import ActivationOffload, offloaded_blocks
from tests.torch.test_apply import MODELS
from workloads.transformer import module as transformer
from workloads.transformer import presets as transformers


def gradients(model, batch):
    torch.manual_seed(3)
    model.zero_grad()
    model(*batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def blocks_of(model):
    return st.torch.apply("optimizer=sgd", copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)).blocks


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_the_untouched_model_bit_by_bit(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    blocks = blocks_of(model)
    plain = gradients(copy.deepcopy(model), batch)
    mover = ActivationOffload(model, blocks[:-1])
    for _ in range(2):
        again = gradients(model, batch)
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert list(mover.moved_bytes) == list(blocks[:-1])
    assert min(mover.moved_bytes.values()) > 0


class Twice(nn.Module):
    """Saves its input for three products and one tensor of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        return self.c(F.relu(self.a(x) + self.b(x)))


def test_a_tensor_that_is_saved_often_moves_once_and_weights_stay():
    model = nn.Sequential(*(Twice() for _ in range(3)))
    mover = ActivationOffload(model, ["0", "1"])
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    one = 4 * 8 * 4
    assert mover.moved_bytes == {"0": 2 * one, "1": 2 * one}  # its input, and what relu gives


def test_what_was_moved_is_let_go_after_backward():
    model = nn.Sequential(*(Twice() for _ in range(4)))
    mover = ActivationOffload(model, ["0", "1", "2"])
    inputs = []
    model[1].register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    gc.disable()
    try:
        loss = model(torch.randn(4, 8)).sum()
        assert inputs[0]() is None  # the device has no copy once the pass has ended
        loss.backward()
    finally:
        gc.enable()
    assert mover.moved_bytes["1"] > 0


def test_passes_without_gradients_move_nothing():
    model = nn.Sequential(Twice(), Twice())
    mover = ActivationOffload(model, ["0"])
    with torch.no_grad():
        model(torch.randn(4, 8))
    assert mover.moved_bytes == {}


def test_as_many_bytes_move_as_predicted():
    spec = transformers.spec("gpt", layers=4, hidden=64, heads=4, vocabulary=128, sequence=32, max_positions=32)
    model, batch = transformer.Transformer(spec), transformer.example_batch(spec, 4, 32)
    blocks = blocks_of(model)
    mover = ActivationOffload(model, blocks[:-1])
    model(*batch).backward()
    workload = st.workload("gpt", layers=4, hidden=64, heads=4, vocabulary=128, seq_len=32)
    setting = resolve(workload, "dgx-2", st.Strategy(micro_batch=4, offload="activations"))
    lane = lay_out(setting).lanes[0]
    predicted = [saved_row(setting, lane, s).sum() for s in movable_segments(lane.chunks[0], "none")][:-1]
    assert list(mover.moved_bytes.values()) == pytest.approx(predicted, rel=0.02)


def test_which_blocks_move():
    names = ["a", "b", "c"]
    assert offloaded_blocks(st.Strategy(offload="activations"), names) == ["a", "b"]
    assert offloaded_blocks(st.Strategy(offload="activations(0,2)"), names) == ["a", "c"]
    with pytest.raises(StrategyError, match="blocks 0 to 2"):
        offloaded_blocks(st.Strategy(offload="activations(3)"), names)


def test_what_is_not_carried_out_is_refused_or_said():
    model = nn.Sequential(Twice(), Twice())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="only activations"):
        st.torch.apply("optimizer=sgd,offload=optimizer", model, optimizer)
    applied = st.torch.apply("optimizer=sgd,offload=activations", model, optimizer)
    assert applied.offloaded is None
    assert any("on the CPU already" in note for note in applied.notes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_falls_and_gradients_stay():
    torch.manual_seed(0)
    model = nn.Sequential(*(Twice() for _ in range(6))).cuda()
    x = torch.randn(4096, 8, device="cuda")
    plain, peaks = None, []
    for offload in ("none", "activations"):
        own = copy.deepcopy(model)
        applied = st.torch.apply(f"optimizer=sgd,offload={offload}", own, torch.optim.SGD(own.parameters(), lr=0.1))
        torch.cuda.reset_peak_memory_stats()
        with applied.forward():
            loss = own(x).sum()
        loss.backward()
        found = {n: p.grad for n, p in own.named_parameters()}
        plain = plain or found
        assert all(torch.equal(plain[n], found[n]) for n in plain)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
