"""The closed form of the transformer against the real module: operator by operator, byte by byte."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simtrain.core.precision import precision
from simtrain.core.workload import Workload
from tests.workloads.list_replay import Replay, unfuse
from tests.workloads.real_run import count_flops, fuse_rms_norms, record_allocations, record_saved
from workloads.transformer.module import Transformer, example_batch
from workloads.transformer.operators import workload
from workloads.transformer.presets import spec as preset
from workloads.transformer.spec import TransformerSpec

AUTOCAST = {"fp32": None, "bf16-amp": torch.bfloat16}

GPT: dict[str, Any] = {"layers": 2, "hidden": 48, "heads": 4, "vocabulary": 101, "max_positions": 40, "sequence": 33}
MOE = GPT | {"layers": 1, "ffn": 40, "experts": 4, "top_k": 2}
CASES = {
    "gpt": ("gpt", GPT),
    "gpt, one odd block": ("gpt", GPT | {"layers": 1, "hidden": 21, "heads": 3, "ffn": 50, "sequence": 7}),
    "gpt, exact gelu, no biases, own head": ("gpt", GPT | {"activation": "gelu", "bias": False, "tied_head": False}),
    "gpt, wide heads, not causal": ("gpt", GPT | {"head_dim": 20, "causal": False}),
    "gpt, separate projections": ("gpt", GPT | {"fused_qkv": False, "kv_heads": 2}),
    "gpt, no positions, normalized embedding": ("gpt", GPT | {"positions": "none", "embedding_norm": True}),
    "gpt, squared relu": ("gpt", GPT | {"activation": "relu-squared", "bias": False}),
    "gpt, normalized queries and keys": ("gpt", GPT | {"fused_qkv": False, "qk_norm": True}),
    "llama": ("llama", GPT | {"ffn": 80}),
    "llama, as many key as query heads, tied": ("llama", GPT | {"kv_heads": 4, "tied_head": True, "ffn": 31}),
    "llama, one key head, three blocks": ("llama", GPT | {"kv_heads": 1, "layers": 3, "ffn": 64, "bias": True}),
    "bert": ("bert", GPT | {"dropout": 0.0}),
    "bert, one matrix": ("bert", GPT | {"dropout": 0.0, "fused_qkv": True, "layers": 3}),
    "bert, language model": ("bert", GPT | {"dropout": 0.0, "head": "lm"}),
    "bert, masked tokens": ("bert", GPT | {"dropout": 0.0, "head": "mlm"}),
    "bert, masked tokens, norms before": ("bert", GPT | {"dropout": 0.0, "head": "mlm", "norm_position": "pre", "tied_head": False}),
    "bert, no segments, norms before": ("bert", GPT | {"dropout": 0.0, "token_types": 0, "norm_position": "pre"}),
    "mixture of experts": ("llama", MOE),
    "mixture, shared experts, plain weights": ("llama", MOE | {"shared_ffn": 24, "pre_softmax": True, "top_k": 3}),
    "mixture, dense blocks before and between": ("llama", MOE | {"layers": 4, "dense_layers": 1, "expert_every": 2, "expert_ffn": 16}),
    "mixture, no gate, one expert a token": ("gpt", MOE | {"top_k": 1, "bias": False, "kv_heads": 0, "shared_ffn": 16}),
    "mixture, norms behind": ("bert", MOE | {"dropout": 0.0, "bias": False}),
}
BATCH = 3
NOT_ON_A_CPU = {
    (case, "bf16-amp") for case in ("gpt, normalized queries and keys", "bert, masked tokens", "bert, masked tokens, norms before")
}
"""Autocast on the CPU leaves a norm of 16-bit values in 16 bit, on CUDA it does not."""


def spec_of(case: str) -> TransformerSpec:
    family, options = CASES[case]
    return preset(family, **options)


def real_model(spec: TransformerSpec, attention: str = "fused") -> Transformer:
    torch.manual_seed(0)
    model = Transformer(spec, attention)  # type: ignore[arg-type]
    if attention == "fused":  # else RMS norms are composed, too, as on a CPU
        fuse_rms_norms(model)
    return model


def flops(work: Workload, batch: int, *, unfused: bool = False) -> float:
    change = unfuse if unfused else tuple
    operators = [op for layer in work for op in change(layer.forward + layer.backward)]
    return sum(op.flops(batch, work.sequence) for op in operators)


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("case", CASES)
def test_every_allocation_and_release_is_as_in_pytorch(case: str, name: str) -> None:
    if (case, name) in NOT_ON_A_CPU:
        pytest.skip("only CUDA's autocast runs norms in fp32")
    spec = spec_of(case)
    model, batch = real_model(spec), example_batch(spec, BATCH)
    real = record_allocations(model, batch, AUTOCAST[name])
    ours = Replay(workload(spec), BATCH, precision(name)).moments()
    assert [(sorted(m.allocated), m.live) for m in ours] == [(sorted(m.allocated), m.live) for m in real]


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("case", CASES)
def test_saved_tensors_are_those_autograd_packs(case: str, name: str) -> None:
    if (case, name) in NOT_ON_A_CPU:
        pytest.skip("only CUDA's autocast runs norms in fp32")
    spec = spec_of(case)
    model, batch = real_model(spec), example_batch(spec, BATCH)
    assert Replay(workload(spec), BATCH, precision(name)).saved() == record_saved(model, batch, AUTOCAST[name])


@pytest.mark.parametrize("attention", ["fused", "unfused"])
@pytest.mark.parametrize("case", CASES)
def test_flops_equal_the_counter_of_torch(case: str, attention: str) -> None:
    spec = spec_of(case)
    counted = count_flops(real_model(spec, attention), example_batch(spec, BATCH))
    assert flops(workload(spec), BATCH, unfused=attention == "unfused") == counted


@pytest.mark.parametrize("case", CASES)
def test_unfused_attention_has_the_peak_and_the_saved_tensors_of_pytorch(case: str) -> None:
    # In fp32 only: under autocast softmax stays in bf16 on the CPU, while the lists state the fp32 softmax of CUDA.
    spec = spec_of(case)
    model, batch = real_model(spec, "unfused"), example_batch(spec, BATCH)
    ours = Replay(workload(spec), BATCH, precision("fp32"), unfused=True)
    assert ours.saved() == record_saved(model, batch)
    peak, real_peak = (max(m.live for m in moments) for moments in (ours.moments(), record_allocations(model, batch)))
    assert peak == pytest.approx(real_peak, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_parameters_have_the_names_shapes_and_order_of_the_module(case: str) -> None:
    spec = spec_of(case)
    model, work = real_model(spec), workload(spec)
    places = ["embedding", *(f"blocks.{i}" for i in range(spec.layers)), "head"]
    ours = [(f"{place}.{p.name}", p.shape) for place, layer in zip(places, work, strict=True) for p in layer.parameters if not p.tied_to]
    assert ours == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert work.parameter_count == sum(p.numel() for p in model.parameters())


def test_tied_parameters_share_storage_in_the_module() -> None:
    model, work = real_model(spec_of("gpt")), workload(spec_of("gpt"))
    tied = [p for p in work.layers[-1].parameters if p.tied_to]
    assert [p.tied_to for p in tied] == ["embedding.wte.weight"]
    assert model.head.get_parameter(tied[0].name) is model.get_parameter("embedding.wte.weight")


@pytest.mark.parametrize("case", ["gpt", "llama", "bert"])
def test_fused_and_unfused_attention_compute_the_same(case: str) -> None:
    spec = spec_of(case)
    fused, unfused = real_model(spec), real_model(spec, "unfused")
    batch = example_batch(spec, BATCH)
    torch.testing.assert_close(fused(*batch), unfused(*batch))


def test_rotation_depends_on_distance_only() -> None:
    from workloads.transformer.attention_module import rotate, rotation_table

    table = rotation_table(spec_of("llama"))
    q, k = torch.randn(2, 1, 1, 1, 12).expand(2, 1, 20, 1, 12)
    scores = (rotate(q, table).squeeze() @ rotate(k, table).squeeze().T).detach()
    torch.testing.assert_close(scores[3, 1], scores[15, 13])
    assert not torch.isclose(scores[3, 1], scores[4, 1])


@st.composite
def specs(draw: st.DrawFn) -> tuple[TransformerSpec, int]:
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    positions = draw(st.sampled_from(["learned", "rotary"]))
    spec = TransformerSpec(
        layers=draw(st.integers(1, 3)),
        hidden=heads * draw(st.sampled_from([2, 6, 8])),
        heads=heads,
        kv_heads=draw(st.sampled_from([0, *(d for d in (1, 2, 3) if heads % d == 0)])),
        ffn=draw(st.integers(1, 40)),
        vocabulary=draw(st.integers(2, 90)),
        max_positions=64,
        sequence=draw(st.integers(1, 40)),
        causal=draw(st.booleans()),
        positions=positions,
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        activation=draw(st.sampled_from(["gelu", "gelu-tanh", "swiglu"])),
        bias=draw(st.booleans()),
        fused_qkv=positions == "learned" and draw(st.booleans()),
        tied_head=draw(st.booleans()),
        token_types=draw(st.integers(0, 2)),
        head=draw(st.sampled_from(["lm", "span"])),
    )
    return spec, draw(st.integers(1, 4))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs(), st.sampled_from(list(AUTOCAST)))
def test_any_transformer_allocates_as_in_pytorch(drawn: tuple[TransformerSpec, int], name: str) -> None:
    spec, size = drawn
    model, batch = real_model(spec), example_batch(spec, size)
    work = workload(spec)
    real = record_allocations(model, batch, AUTOCAST[name])
    ours = Replay(work, size, precision(name)).moments()
    assert [(sorted(m.allocated), m.live) for m in ours] == [(sorted(m.allocated), m.live) for m in real]
    assert flops(work, size) == count_flops(model, batch)
