"""The recorder: the same on real and on fake tensors, and in agreement with what PyTorch says by other means."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from simtrain.torch import Phase, Recording, record_step
from tests.torch.small_models import Checkpointed, cross_entropy, fake_step, image_network, samples, tower
from workloads.transformer.module import Transformer, example_batch
from workloads.transformer.presets import spec

GPT = {"layers": 2, "hidden": 48, "heads": 4, "vocabulary": 101, "max_positions": 40, "sequence": 33}
CASES = {
    "gpt": lambda: Transformer(spec("gpt", **GPT)),
    "llama": lambda: Transformer(spec("llama", **GPT, ffn=80)),
    "bert with dropout": lambda: Transformer(spec("bert", **GPT, dropout=0.1)),
}


def transformer_batch(case: str):
    return example_batch(spec(case.split(maxsplit=1)[0], **GPT), 3)


def step(build, batch, *, fake: bool) -> Recording:
    mode = FakeTensorMode() if fake else torch.random.fork_rng(devices=[])
    given = tuple(mode.from_tensor(t) for t in batch) if isinstance(mode, FakeTensorMode) else batch
    with mode:
        module = build()
        optimizer = torch.optim.AdamW(module.parameters())
        return record_step(module, lambda: module(*given), given, optimizer=optimizer)


@pytest.mark.parametrize("case", CASES)
def test_fake_tensors_do_what_real_ones_do(case: str) -> None:
    batch = transformer_batch(case)
    real, fake = (step(CASES[case], batch, fake=fake) for fake in (False, True))
    assert [(c.name, c.module, c.phase, c.new, c.updates) for c in real.calls] == [
        (c.name, c.module, c.phase, c.new, c.updates) for c in fake.calls
    ]
    assert real.releases == fake.releases
    assert (real.peak_bytes, real.flops, real.saved) == (fake.peak_bytes, fake.flops, fake.saved)
    assert real.peak_bytes > real.given_bytes > 0


def test_peak_is_that_of_pytorchs_own_tracker() -> None:
    batch = transformer_batch("gpt")
    ours = step(CASES["gpt"], batch, fake=False)
    module = CASES["gpt"]()
    optimizer = torch.optim.AdamW(module.parameters())
    tracker = MemTracker()
    tracker.track_external(module, optimizer, *batch)
    with tracker:
        for i in range(2):
            module(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == 0:
                tracker.reset_mod_stats()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert ours.peak_bytes == pytest.approx(theirs, rel=1e-3)


def test_gradients_loss_and_given_tensors_are_named() -> None:
    module = Transformer(spec("gpt", **GPT))
    batch = transformer_batch("gpt")
    recording = record_step(module, lambda: module(*batch), batch)
    assert set(recording.gradients) == {name for name, _ in module.named_parameters()}
    assert {"parameter:embedding.wte.weight", "input:0", "input:1"} <= set(recording.given.values())
    assert recording.storage_bytes[recording.loss] == 4
    assert all(p.grad is None for p in module.parameters())
    assert {c.phase for c in recording.calls} == {Phase.FORWARD, Phase.BACKWARD}


def test_storages_are_shared_by_views_and_released_once() -> None:
    recording = fake_step(tower, samples(10), cross_entropy, "fp32")
    views = [c for c in recording.calls if c.is_view]
    assert views
    assert all(not c.new for c in views)
    gone = [storage for _, storage in recording.releases]
    assert len(gone) == len(set(gone))
    assert any(c.updates and c.short_name == "relu_" for c in recording.calls)
    assert min(recording.live_bytes) >= recording.given_bytes


def test_recomputation_is_seen() -> None:
    batch = samples(10)
    plain, again = (fake_step(lambda again=again: Checkpointed(again), batch, cross_entropy, "fp32") for again in (False, True))
    assert not plain.recomputed
    assert {c.short_name for c in again.recomputed} == {"addmm", "gelu"}
    assert {c.module for c in again.recomputed} == {f"blocks.{i}.{j}" for i in range(3) for j in range(2)}
    assert again.flops > plain.flops
    assert sum(again.storage_bytes[s] for s in again.saved) < sum(plain.storage_bytes[s] for s in plain.saved)
    assert again.peak_bytes < plain.peak_bytes


def test_batch_statistics_are_updates_of_buffers() -> None:
    recording = fake_step(image_network, samples(3, 16, 16), cross_entropy, "fp32")
    written = {recording.given.get(s) for c in recording.calls for s in c.updates}
    assert {"buffer:1.running_mean", "buffer:1.running_var", "buffer:1.num_batches_tracked"} <= written


def test_the_package_named_torch_does_not_hide_the_real_one() -> None:
    import simtrain as st

    assert st.torch is not torch
    assert st.torch.__name__ == "simtrain.torch"
    from simtrain.torch import recorder

    assert recorder.torch is torch
    assert isinstance(nn.Linear(1, 1).weight, recorder.Tensor)


def test_torch_is_loaded_only_when_used() -> None:
    import subprocess
    import sys

    script = "import sys, simtrain; simtrain.torch.workload_readers(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1] == "False"
