"""Models of Hugging Face Transformers, where it is installed (it is no dependency of simtrain)."""

import warnings
from typing import Any

import pytest
import torch

import simtrain as st
from simtrain.torch import Phase
from tests.torch.small_models import fake_step, peaks
from workloads.transformer.operators import workload
from workloads.transformer.presets import spec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="Hugging Face Transformers is not installed (and no dependency)")

IDS = torch.zeros(3, 32, dtype=torch.long)
BATCH = {"input_ids": IDS, "labels": IDS}
TOKENS: dict[str, Any] = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(n_layer=3, n_embd=48, n_head=4, n_positions=64, loss_type="ForCausalLM", **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def llama() -> torch.nn.Module:
    sizes = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(max_position_embeddings=64, **sizes, **TOKENS))


def bert() -> torch.nn.Module:
    sizes = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    return transformers.BertForMaskedLM(transformers.BertConfig(max_position_embeddings=64, **sizes, **TOKENS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [gpt2, llama, bert])
def test_blocks_repeat_and_memory_is_that_of_a_recorded_step(build: Any) -> None:
    captured = st.torch.capture(build, BATCH)
    assert 3 in [layer.repeats for layer in captured.layers]
    assert captured.parameter_count == sum(p.numel() for p in build().parameters())
    for precision in ("fp32", "bf16-amp"):
        ours, recorded = peaks(captured, build, BATCH, None, precision)
        assert ours == pytest.approx(recorded, rel=5e-3)


def no_cache() -> torch.nn.Module:
    config = transformers.GPT2Config(n_layer=2, n_embd=48, n_head=4, n_positions=64, use_cache=False, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def attentions(work: st.Workload) -> set[tuple[bool, int]]:
    return {(op.causal, len(op.reads)) for layer in work for op in layer.forward if op.kind == "attention"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [gpt2, llama, bert, no_cache])
@pytest.mark.parametrize("mask", ["none", "whole", "padded"])
def test_masks_are_those_of_real_tensors(build: Any, mask: str) -> None:
    ones = torch.ones_like(IDS)
    batch = BATCH | {"none": {}, "whole": {"attention_mask": ones}, "padded": {"attention_mask": ones.tril()}}[mask]
    shapes, real = (st.torch.capture(build, batch, values=values) for values in (False, True))
    assert attentions(shapes) == attentions(real)
    assert shapes.model_flops(2) == real.model_flops(2)
    if mask != "padded":
        assert {causal for causal, _ in attentions(shapes)} == {build is not bert}
        assert not shapes.assumptions
    else:
        assert "made from the batch" in shapes.assumptions[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [gpt2, llama, bert])
def test_one_sample_runs_the_operators_of_a_recorded_step(build: Any) -> None:
    captured = st.torch.capture(build, BATCH)
    one = {name: tensor[:1] for name, tensor in BATCH.items()}
    for precision in ("fp32", "bf16-amp"):
        ours, recorded = peaks(captured, build, one, None, precision)
        assert ours == pytest.approx(recorded, rel=5e-3)
    assert captured.single is not None
    step = fake_step(build, one, None, "bf16-amp")

    def count(work: st.Workload) -> int:
        return sum(
            op.name.endswith((".sum", "clone", "sum.backward", "clone.backward")) for layer in work for op in layer.forward + layer.backward
        )

    assert count(captured) > count(captured.single)
    assert captured.single.model_flops(1) == captured.model_flops(1)
    calls = [c for c in step.calls if c.phase is not Phase.OPTIMIZER and not c.is_view]
    listed = sum(1 for layer in captured.single for op in layer.forward + layer.backward)
    assert listed == pytest.approx(len(calls), abs=0.1 * len(calls))


@pytest.mark.filterwarnings("ignore")
def test_gpt2_does_the_arithmetic_of_the_closed_form() -> None:
    closed = workload(spec("gpt", layers=3, hidden=48, heads=4, vocabulary=101, max_positions=64, sequence=32))
    captured = st.torch.capture(gpt2, BATCH)
    assert captured.model_flops(4) == closed.model_flops(4)
    a, b = (st.schedule(w, "1x rtx-3090", "micro_batch=16,precision=bf16-amp") for w in (captured, closed))
    assert a.step_time_s == pytest.approx(b.step_time_s, rel=0.5)  # Python copies and a cache of keys and values come on top
