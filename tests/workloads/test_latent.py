"""Latent attention against the real module: parameters, FLOPs and what autograd keeps.

PyTorch's fused kernels on a CPU need values as wide as queries, so that there the attention product itself runs in parts.
"""

from collections import Counter

import pytest

import simtrain as st
from simtrain.core.errors import InputError
from simtrain.core.precision import precision
from simtrain.core.workload import Form, OperatorKind
from tests.workloads.list_replay import Replay
from tests.workloads.real_run import count_flops, fuse_rms_norms, record_saved
from workloads.transformer.module import Transformer, example_batch
from workloads.transformer.operators import workload
from workloads.transformer.presets import spec

SIZES = {"layers": 2, "hidden": 48, "heads": 4, "kv_heads": 0, "head_dim": 16, "query_rank": 24, "kv_rank": 20, "rotary_head": 8}
LATENT = SIZES | {"vocabulary": 101, "max_positions": 40, "sequence": 33, "ffn": 80}
BATCH = 3


def test_parameters_are_those_of_the_module():
    made = spec("llama", **LATENT)
    model, work = Transformer(made), workload(made)
    places = ["embedding", *(f"blocks.{i}" for i in range(made.layers)), "head"]
    ours = [(f"{place}.{p.name}", p.shape) for place, layer in zip(places, work, strict=True) for p in layer.parameters]
    assert ours == [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def test_flops_are_those_of_torch_but_for_the_scores_that_the_kernel_computes_anew():
    made = spec("llama", **LATENT)
    work = workload(made)
    ours = sum(op.flops(BATCH, 33) for layer in work for op in layer.forward + layer.backward)
    again = made.layers * BATCH * made.heads * 33 * 33 * (16 + 24)  # as wide as both products on average
    assert ours - again == count_flops(Transformer(made), example_batch(made, BATCH))


def test_what_autograd_keeps_is_listed():
    made = spec("llama", **LATENT | {"layers": 1})
    ours = Counter(Replay(workload(made), BATCH, precision("fp32")).saved())
    model = Transformer(made)
    fuse_rms_norms(model)
    real = Counter(record_saved(model, example_batch(made, BATCH)))
    rows = BATCH * made.heads * 33
    assert ours - real == Counter([4 * rows])  # the kernel keeps a number for each row of scores
    assert real - ours == Counter([4 * rows * 33])  # its parts keep the scores


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_together_do_the_work_of_one_but_make_latent_vectors_each(sequence_parallel):
    whole = workload(spec("llama", **LATENT))
    assert whole.reform is not None
    part = whole.reform(Form(tensor=2, sequence_parallel=sequence_parallel))
    narrow = ("q_down", "kv_down", "k_rotary")

    def flops(work, *, latent):
        chosen = [op for x in work for op in x.forward + x.backward if any(name in op.name for name in narrow) == latent]
        return sum(op.flops(BATCH, 33) for op in chosen if op.kind is not OperatorKind.COLLECTIVE)

    assert 2 * flops(part, latent=False) == pytest.approx(flops(whole, latent=False), rel=0.02)  # rows of the vocabulary are padded
    assert (2 if sequence_parallel else 1) * flops(part, latent=True) == pytest.approx(flops(whole, latent=True))


def test_a_large_job_is_predicted():
    strategy = "tensor=4,sequence_parallel=true,pipeline=16,data=32,expert=32,accumulation=64,zero=1,precision=bf16,checkpoint=full"
    result = st.schedule("deepseek-v3", "2048x h100-sxm", strategy, runtime="megatron")
    assert 0 < result.mfu < 0.6
    assert any("latent attention" in text for text in result.assumptions)


@pytest.mark.parametrize("options", [{"kv_rank": 0}, {"rotary_head": 7}, {"positions": "none"}, {"kv_heads": 2}])
def test_half_a_latent_attention_is_refused(options):
    with pytest.raises(InputError, match=r"latent attention|even"):
        spec("llama", **LATENT | options)
