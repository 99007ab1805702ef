"""Captured modules of other shapes: their peak memory and FLOPs are those of a recorded step."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import simtrain as st
from simtrain.core.errors import StrategyError
from simtrain.core.result import MemoryKind
from simtrain.core.runtimes import runtime
from simtrain.core.workload import OperatorKind
from simtrain.step.occupancy import COLUMN
from tests.step.books import ledger_of
from tests.torch.small_models import (
    Checkpointed,
    FrozenFirst,
    OwnAttention,
    Perceptron,
    SharedWeights,
    Skips,
    adapted_gpt,
    cross_entropy,
    fake_step,
    image_network,
    in_groups,
    peaks,
    samples,
    tower,
    upsampling,
)

IDS = (torch.zeros(8, 32, dtype=torch.long),) * 2
CASES = {
    "perceptron": (Perceptron, samples(10), cross_entropy),
    "shared weights": (SharedWeights, samples(10), cross_entropy),
    "skips": (Skips, samples(10), cross_entropy),
    "tower": (tower, samples(10), cross_entropy),
    "checkpointed": (Checkpointed, samples(10), cross_entropy),
    "own attention": (OwnAttention, IDS, None),
    "own attention in a list": (lambda: OwnAttention(in_a_list=True), IDS, None),
    "frozen first": (FrozenFirst, samples(10), cross_entropy),
    "adapters": (adapted_gpt, IDS, None),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16-amp"])
@pytest.mark.parametrize("case", CASES)
def test_peak_memory_is_that_of_a_recorded_step(case: str, precision: str) -> None:
    build, batch, loss = CASES[case]
    ours, recorded = peaks(st.torch.capture(build, batch, loss=loss), build, batch, loss, precision)
    assert ours == pytest.approx(recorded, rel=5e-3)


IMAGES = {build.__name__: (build, samples(3, 16, 16), cross_entropy) for build in (image_network, upsampling, in_groups)}


@pytest.mark.parametrize("precision", ["fp32", "bf16-amp"])
@pytest.mark.parametrize("case", IMAGES)
def test_peak_memory_of_convolutions_beside_what_the_library_takes(case: str, precision: str) -> None:
    build, batch, loss = IMAGES[case]
    workload = st.torch.capture(build, batch, loss=loss)
    book = ledger_of(workload, st.Strategy(micro_batch=len(batch[0]), precision=precision), runtime("torch-eager-cpu"))
    own = book.moments.sum(axis=1) - book.moments[:, COLUMN[MemoryKind.WORKSPACE]]
    _, recorded = peaks(workload, build, batch, loss, precision)
    assert own[:-1].max() == pytest.approx(recorded, rel=1e-3)


def test_channels_that_lie_side_by_side_are_seen() -> None:
    def windows(build, batch) -> set[bool]:
        workload = st.torch.capture(build, batch, loss=cross_entropy)
        return {op.window.channels_last for layer in workload for op in layer.forward if op.kind is OperatorKind.CONVOLUTION}

    plain = samples(3, 16, 16)
    turned = (plain[0].to(memory_format=torch.channels_last), plain[1])
    assert windows(image_network, plain) == {False}
    assert windows(image_network, turned) == {True}
    assert windows(image_network().to(memory_format=torch.channels_last), plain) == {True}


def test_transposed_convolutions_are_said_to_be_unmeasured() -> None:
    assert "1 transposed convolutions" in st.torch.capture(in_groups, samples(3, 16, 16), loss=cross_entropy).description


@pytest.mark.parametrize("case", [*CASES, *IMAGES])
def test_flops_are_those_of_a_recorded_step(case: str) -> None:
    build, batch, loss = (CASES | IMAGES)[case]
    workload = st.torch.capture(build, batch, loss=loss)
    counted = sum(op.flops(len(batch[0]), workload.sequence) for layer in workload for op in layer.forward + layer.backward)
    assert counted == fake_step(build, batch, loss, "fp32").flops


def test_a_model_without_blocks_is_one_layer_and_says_so() -> None:
    workload = st.torch.capture(Perceptron(), samples(10), loss=cross_entropy)
    assert workload.depth == 1
    assert "one layer" in workload.description
    assert workload.parameter_count == sum(p.numel() for p in Perceptron().parameters())


def test_equal_blocks_become_one_layer_that_repeats() -> None:
    workload = st.torch.capture(tower, samples(10), loss=cross_entropy)
    assert 4 in [layer.repeats for layer in workload.layers]
    assert workload.parameter_count == sum(p.numel() for p in tower().parameters())


def test_what_crosses_twice_joins_layers() -> None:
    assert all(layer.repeats == 1 for layer in st.torch.capture(Skips, samples(10), loss=cross_entropy).layers)


def test_a_model_that_checkpoints_itself_says_so() -> None:
    assert "run a second time in backward" in st.torch.capture(Checkpointed, samples(10), loss=cross_entropy).description


def test_images_have_statistics_and_cannot_run_twice() -> None:
    workload = st.torch.capture(image_network, samples(3, 16, 16), loss=cross_entropy)
    kinds = {op.kind for layer in workload for op in layer.forward}
    assert {OperatorKind.CONVOLUTION, OperatorKind.BATCH_NORM, OperatorKind.POOLING} <= kinds
    assert sum(layer.buffer_bytes for layer in workload) == sum(b.numel() * b.element_size() for b in image_network().buffers())
    assert not all(layer.safe_to_recompute for layer in workload)
    assert workload.input_bytes(4, 1) == 4 * (3 * 16 * 16 * 4 + 8)
    assert st.schedule(workload, "1x rtx-3090", "micro_batch=16,precision=fp16-amp").step_time_s > 0


def test_the_module_is_left_untouched() -> None:
    module = Perceptron().eval()
    before = {name: p.clone() for name, p in module.named_parameters()}
    st.torch.capture(module, samples(10), loss=cross_entropy)
    assert not module.training
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in module.named_parameters())
    assert type(module.a.weight) is nn.Parameter
    module(samples(10)[0])


def test_outputs_with_a_loss_inside() -> None:
    class Says(Perceptron):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how

        def forward(self, x: Tensor, targets: Tensor):
            loss = F.cross_entropy(super().forward(x), targets)
            return {"dict": {"loss": loss}, "tuple": (loss, x), "tensor": loss}[self.how]

    flops = {st.torch.capture(Says(how), samples(10)).model_flops(1) for how in ("dict", "tuple", "tensor")}
    assert len(flops) == 1


def test_control_flow_on_values_is_captured_on_real_tensors() -> None:
    class Branches(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if y.sum().item() > 1e9 else y

    workload = st.torch.capture(Branches, samples(10), loss=cross_entropy)
    assert "real tensors" in workload.description
    assert "waits 1 times" in workload.description
    assert workload.parameter_count == 703


def test_a_mask_for_all_blocks_is_held_like_the_batch() -> None:
    workload = st.torch.capture(lambda: OwnAttention(in_a_list=True), IDS)
    assert 2 in [layer.repeats for layer in workload.layers]
    held = {t.name for layer in workload for t in layer.inputs if t.name.startswith("input:held.")}
    assert held
    assert workload.input_bytes(1, 32) > 2 * 32 * 8


class Masked(nn.Module):
    """Attention with a mask of its own making, or one from the batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table, self.out = how, nn.Embedding(11, 16), nn.Linear(16, 1)

    def forward(self, ids: Tensor, given: Tensor) -> Tensor:
        x, at = self.table(ids)[:, None], torch.arange(ids.shape[1])
        mask = {"tril": torch.ones(len(at), len(at)).tril().bool(), "compared": at[:, None] >= at[None], "given": given[:, None, None] > 0}
        x = F.scaled_dot_product_attention(x, x, x, mask[self.how], is_causal=False)
        return self.out(x).mean()


@pytest.mark.parametrize(
    ("how", "said"), [("tril", "a causal mask"), ("compared", "a causal mask"), ("given", "a mask made from the batch")]
)
def test_masks_that_attention_gets_are_said(how: str, said: str) -> None:
    workload = st.torch.capture(Masked(how), IDS)
    assert any(f"attention gets {said} as a tensor (1 times)" in line for line in workload.assumptions)
    shown = st.schedule(workload, "1x rtx-3090", "micro_batch=4,precision=bf16-amp").assumptions
    assert workload.assumptions[0] in shown


def test_a_model_that_cannot_run_one_sample_is_refused_there() -> None:
    def norm_of_vectors() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))

    workload = st.torch.capture(norm_of_vectors, samples(10), loss=cross_entropy)
    assert st.schedule(workload, "1x rtx-3090", "micro_batch=2").step_time_s > 0
    with pytest.raises(StrategyError, match=r"cannot run micro-batches of 1 .*Expected more than 1 value.*use micro_batch=2 or more"):
        st.schedule(workload, "1x rtx-3090", "micro_batch=1")
    plan = st.plan(workload, "1x rtx-3090", global_batch=4)
    assert all(result.strategy and "micro_batch=1," not in result.strategy for result in plan.ranked)


@pytest.mark.parametrize(("weights", "fused"), [(False, 1), (True, 0)])
def test_dropout_leaves_attention_of_pytorchs_own_module_fused(weights, fused):
    """On a GPU the fused kernel draws its own dropout; who asks for the weights gets the unfused form everywhere."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, dropout=0.1, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=weights)[0].square().mean()

    kinds = [op.kind for layer in st.torch.capture(Net, torch.randn(2, 16, 64)).layers for op in layer.forward]
    assert kinds.count(OperatorKind.ATTENTION) == fused
    assert kinds.count(OperatorKind.SOFTMAX) == 1 - fused
