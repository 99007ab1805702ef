"""A workload with tensorized weights is the captured module with tensorized layers: parameters, FLOPs, memory and time."""

from typing import Any

import pytest
import torch
from torch import nn

import simtrain as st
from simtrain.core.tensorize import parse_tensorize
from simtrain.torch.pieces import block_paths
from simtrain.torch.tensor_conversion import tensorize_blocks
from tests.workloads.image_models import image_model
from workloads.transformer.module import Transformer, example_batch
from workloads.transformer.operators import workload
from workloads.transformer.presets import spec

SMALL = {"layers": 3, "hidden": 48, "heads": 4, "vocabulary": 101, "max_positions": 96, "sequence": 32}
FORMS = ("low-rank:rank=7", "low-rank:compression=3")
CASES = {
    **{f"gpt {form}": ("gpt", SMALL, form) for form in FORMS},
    "gpt without biases": ("gpt", SMALL | {"fused_qkv": False, "kv_heads": 2, "bias": False}, FORMS[0]),
    "llama": ("llama", SMALL | {"ffn": 96, "kv_heads": 2}, FORMS[1]),
    "bert": ("bert", SMALL, FORMS[0]),
    **{
        f"resnet18 {form}": ("resnet18", {"image_size": 64, "width": 16}, form) for form in ("tucker:compression=3", "tensor-train:rank=20")
    },
    "resnet50": ("resnet50", {"image_size": 64, "width": 16}, "tucker:rank=24"),
    "vit": ("vit-tiny", {"layers": 3, "image_size": 64}, "low-rank:compression=4"),
}


def real_and_closed(case: str) -> tuple[nn.Module, Any, st.Workload]:
    name, options, form = CASES[case]
    torch.manual_seed(0)
    if name in ("gpt", "llama", "bert"):
        numbers = spec(name, **options)
        module: nn.Module = Transformer(numbers)
        batch, work = example_batch(numbers, 3), workload(numbers)
    else:
        model = image_model(name, **options)
        module, batch, work = model.build(), model.batch_of(3), model.work
    parsed = parse_tensorize(form)
    assert parsed is not None
    assert tensorize_blocks(module, sorted(block_paths(module)), parsed)
    return module, batch, st.tensorize(work, form)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_captured_module(case: str) -> None:
    module, batch, closed = real_and_closed(case)
    ours = st.torch.capture(module, batch)
    assert [[p.shape for p in layer.parameters] for layer in ours] == [[p.shape for p in layer.parameters] for layer in closed]
    for size in (3, 8):
        assert ours.model_flops(size) == closed.model_flops(size)
        for precision, checkpoint in (("fp32", "none"), ("bf16-amp", "full" if "resnet" not in case else "none")):
            strategy = st.Strategy(micro_batch=size, precision=precision, checkpoint=checkpoint)
            a, b = (st.schedule(w, "1x rtx-3090", strategy) for w in (ours, closed))
            assert a.memory.allocated_bytes == pytest.approx(b.memory.allocated_bytes, rel=1e-3)
            assert a.step_time_s == pytest.approx(b.step_time_s, rel=1e-2)
