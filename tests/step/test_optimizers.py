"""What optimizers keep of each parameter in real recipes, and what their updates do."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import simtrain as st
from simtrain.core import catalog
from simtrain.core.errors import UnsupportedError
from simtrain.core.precision import precision
from simtrain.core.result import MemoryKind
from simtrain.core.workload import Parameter
from simtrain.step.layout import lay_out
from simtrain.step.occupancy import COLUMN
from simtrain.step.optimizers import muon_kernels, newton_schulz_flops, state_tensors
from simtrain.step.setting import resolve
from simtrain.step.states import holds_gradients, optimizer_transients, persistent
from simtrain.step.synchronise import update_cost

KINDS = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)


def bytes_per_parameter(recipe: str, optimizer: str, runtime: str, form: str = "data=1") -> float:
    workload = catalog.workload("gpt2-small")
    strategy = st.Strategy.parse(f"{form},precision={recipe},optimizer={optimizer}")
    layout = lay_out(resolve(workload, f"{strategy.ranks}x h100", strategy, runtime))
    row = persistent(layout.setting, layout.lanes[0])
    count = sum(p.elements for p in layout.lanes[0].chunks[0].parameters)
    own = 0 if holds_gradients(layout.setting) else precision(recipe).parameter.size_bytes
    return sum(row[COLUMN[kind]] for kind in KINDS) / count + own


@pytest.mark.parametrize(
    ("recipe", "optimizer", "runtime", "expected"),
    [
        ("fp32", "adamw", "torch-eager", 4 + 4 + 8),
        ("bf16-amp", "adamw", "torch-eager", 4 + 4 + 8),  # autocast keeps fp32 weights; casts are cached beside them
        ("fp32", "sgd", "torch-eager", 4 + 4),
        ("fp32", "sgd-momentum", "torch-eager", 4 + 4 + 4),
        ("bf16", "adamw", "torch-eager", 2 + 2 + 4),  # pure bf16
        ("bf16-kahan", "adamw", "torch-eager", 2 + 2 + 4 + 2),
        ("bf16-master", "adamw", "megatron", 18),  # Megatron-LM, docs of the distributed optimizer: 18 bytes (fp32 gradients)
        ("fp16-master", "adamw", "megatron", 16),  # the same table: 16 bytes (fp16 gradients)
        ("bf16-master", "sgd-momentum", "megatron", 2 + 4 + 8),
    ],
)
def test_bytes_per_parameter_are_those_of_real_recipes(recipe: str, optimizer: str, runtime: str, expected: float) -> None:
    assert bytes_per_parameter(recipe, optimizer, runtime) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("recipe", "ranks", "expected"), [("bf16-master", 4, 6 + 12 / 4), ("fp16-master", 4, 4 + 12 / 4)])
def test_the_distributed_optimizer_of_megatron_shards_twelve_bytes(recipe: str, ranks: int, expected: float) -> None:
    """Megatron-LM, docs of the distributed optimizer: 6 + 12/d bytes in bf16 and 4 + 12/d in fp16 over d ranks."""
    assert bytes_per_parameter(recipe, "adamw", "megatron", f"data={ranks},zero=1") == pytest.approx(expected, rel=1e-4)


def test_zero_counts_sixteen_bytes_and_an_fp32_copy_of_the_gradients_it_updates_with() -> None:
    """Rajbhandari et al. 2020: 2 + 2 + 12/d; DeepSpeed converts its share of the gradients to fp32 beside that."""
    assert bytes_per_parameter("fp16-master", "adamw", "deepspeed", "data=8,zero=1") == pytest.approx(2 + 2 + 12 / 8 + 4 / 8, rel=1e-4)


def test_eight_bit_states_take_two_bytes_and_their_scales_but_of_small_tensors_eight() -> None:
    fp32 = precision("fp32")
    large, small = Parameter("w", (1024, 1024)), Parameter("b", (4095,))
    total = {p.name: sum(n * size for n, size in state_tensors("adamw-8bit", p, fp32, block=True)) for p in (large, small)}
    assert total == {"w": 2 * 2**20 + 2 * 4 * 2**20 / 256, "b": 8 * 4095}
    whole, packed = (bytes_per_parameter("fp32", name, "torch-eager") - 8 for name in ("adamw", "adamw-8bit"))
    assert 0.25 < packed / whole < 0.26  # "75 % of the memory of the states is saved", as bitsandbytes' package index page says


@pytest.mark.parametrize("shape", [(64, 32), (32, 96), (48, 48)])
def test_muon_does_the_products_and_keeps_the_states_of_pytorch(shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.randn(*shape))
    weight.grad = torch.randn(*shape)
    optimizer = torch.optim.Muon([weight])
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == newton_schulz_flops(shape)
    products = muon_kernels([shape], precision("fp32"))[1]
    assert products.flops.sum() == newton_schulz_flops(shape)
    kept = sum(t.numel() * t.element_size() for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor) and t.numel() > 1)
    stated = state_tensors("muon", Parameter("w", shape), precision("fp32"), block=True)
    assert kept == sum(count * size for count, size in stated)


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    workload = catalog.workload("gpt2-small")
    matrices = sum(x.repeats * p.elements for x in workload.layers if x.block for p in x.parameters if len(p.shape) == 2)
    share = matrices / workload.parameter_count
    assert bytes_per_parameter("fp32", "muon", "torch-eager") == pytest.approx(8 + 4 * share + 8 * (1 - share), rel=1e-4)


def seconds(optimizer: str, form: str = "data=1", recipe: str = "fp32", model: str = "gpt2-small") -> float:
    strategy = st.Strategy.parse(f"{form},precision={recipe},optimizer={optimizer}")
    layout = lay_out(resolve(catalog.workload(model), f"{strategy.ranks}x h100", strategy, "torch-eager"))
    return update_cost(layout.setting, layout.lanes[0]).device_s


def test_an_update_takes_its_traffic_or_its_products() -> None:
    workload, gpu = catalog.workload("gpt2-small"), catalog.device("h100")
    traffic = catalog.workload("llama3-8b").parameter_count * (3 * 4 + 4) / gpu.memory.bandwidth_bytes_per_s
    assert traffic < seconds("adamw-8bit", model="llama3-8b") < 1.5 * traffic
    assert seconds("adamw-8bit") < seconds("adamw")
    flops = sum(x.repeats * newton_schulz_flops(p.shape) for x in workload.layers if x.block for p in x.parameters if len(p.shape) == 2)
    assert seconds("muon") > flops / gpu.peak_flops["bf16"] + seconds("sgd-momentum") / 4
    assert seconds("adamw", recipe="bf16-kahan") > seconds("adamw", recipe="bf16")


def test_ranks_of_zero_deal_whole_matrices_out() -> None:
    """With more ranks than matrices of one size, whoever has a largest one sets the pace."""
    one, few, many = (seconds("muon", f"data={n},zero=1" if n > 1 else "data=1") for n in (1, 4, 256))
    assert one / 4.5 < few < one / 2
    largest = max(
        newton_schulz_flops(p.shape) for x in catalog.workload("gpt2-small").layers if x.block for p in x.parameters if len(p.shape) == 2
    )
    assert many > largest / catalog.device("h100").peak_flops["bf16"]


def test_the_update_of_a_matrix_needs_room_for_its_steps() -> None:
    layout = lay_out(resolve("gpt2-small", "h100", "optimizer=muon", "megatron"))
    held = optimizer_transients(layout.setting, layout.lanes[0])[COLUMN[MemoryKind.TRANSIENT]]
    assert math.isclose(held, 8 * 768 * 3072 + 4 * 768 * 768)


@pytest.mark.parametrize(
    ("model", "cluster", "strategy", "match"),
    [
        ("gpt2-small", "8x h100", "tensor=2,optimizer=muon", "whole matrices, which tensor=2 divides"),
        ("gpt2-small", "8x h100", "data=2,zero=3,optimizer=muon", "zero=3 divides"),
        ("mixtral-8x7b", "8x h100", "optimizer=muon", "not modelled for experts"),
        ("gpt2-small", "tpu-v4", "optimizer=adamw-8bit,precision=bf16", "bitsandbytes' for GPUs, and TPU-v4"),
    ],
)
def test_what_is_not_modelled_is_refused(model: str, cluster: str, strategy: str, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        st.estimate(model, cluster, strategy)
