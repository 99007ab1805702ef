"""The closed forms of image models against the real modules: operator by operator, byte by byte."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simtrain.core.precision import precision
from tests.workloads.image_models import all_flops, image_model
from tests.workloads.list_replay import Replay
from tests.workloads.real_run import count_flops, record_allocations, record_saved

AUTOCAST = {"fp32": None, "bf16-amp": torch.bfloat16}
SMALL: dict[str, Any] = {"width": 8, "image_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet 18": ("resnet", SMALL),
    "resnet 34, odd image": ("resnet", SMALL | {"depth": 34, "image_size": 33}),
    "resnet 50": ("resnet", SMALL | {"depth": 50}),
    "resnet 50, small stem, odd image": ("resnet", SMALL | {"depth": 50, "stem": "cifar", "image_size": 17}),
    "resnet 18, channels last": ("resnet", SMALL | {"channels_last": True}),
    "vit": ("vit", {}),
    "vit, one odd block": ("vit", {"layers": 1, "hidden": 21, "heads": 3, "image_size": 24, "ffn": 50}),
}
BATCH = 3


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("case", CASES)
def test_every_allocation_release_and_saved_tensor_is_as_in_pytorch(case: str, name: str) -> None:
    preset, options = CASES[case]
    model = image_model(preset, **options)
    module, batch = model.build(), model.batch_of(BATCH)
    ours = Replay(model.work, BATCH, precision(name))
    real = record_allocations(module, batch, AUTOCAST[name])
    assert [(sorted(m.allocated), m.live) for m in ours.moments()] == [(sorted(m.allocated), m.live) for m in real]
    assert ours.saved() == record_saved(module, batch, AUTOCAST[name])


@pytest.mark.parametrize("case", CASES)
def test_flops_equal_the_counter_of_torch(case: str) -> None:
    preset, options = CASES[case]
    model = image_model(preset, **options)
    assert all_flops(model.work, BATCH) == count_flops(model.build(), model.batch_of(BATCH))


@pytest.mark.parametrize("preset", ["resnet18", "resnet50", "resnet50-cifar", "vit-tiny", "vit-base"])
def test_presets_have_the_parameters_of_the_module_in_its_order(preset: str) -> None:
    model = image_model(preset)
    with torch.device("meta"):
        module = model.build()
    shapes = [parameter.shape for layer in model.work for parameter in layer.parameters]
    assert shapes == [tuple(p.shape) for p in module.parameters()]
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    assert buffers == sum(layer.buffer_bytes for layer in model.work)


def test_flops_of_the_presets_equal_the_counter_of_torch() -> None:
    model = image_model("resnet50", image_size=64)
    assert all_flops(model.work, 1) == count_flops(model.build(), model.batch_of(2)) / 2


def test_unfused_attention_of_a_vision_transformer_counts_as_in_pytorch() -> None:
    model = image_model("vit")
    module, batch = model.build(attention="unfused"), model.batch_of(BATCH)
    ours = Replay(model.work, BATCH, precision("fp32"), unfused=True)
    assert ours.saved() == record_saved(module, batch)
    peak, real_peak = (max(m.live for m in moments) for moments in (ours.moments(), record_allocations(module, batch)))
    assert peak == real_peak


@st.composite
def residual_networks(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "depth": draw(st.sampled_from([18, 50])),
        "width": draw(st.sampled_from([1, 3, 4, 8])),
        "image_size": draw(st.integers(20, 49)),
        "classes": draw(st.integers(1, 12)),
        "stem": draw(st.sampled_from(["imagenet", "cifar"])),
    }


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(residual_networks(), st.integers(2, 4), st.sampled_from(list(AUTOCAST)))
def test_any_residual_network_allocates_as_in_pytorch(options: dict[str, Any], size: int, name: str) -> None:
    model = image_model("resnet", **options)
    real = record_allocations(model.build(), model.batch_of(size), AUTOCAST[name])
    ours = Replay(model.work, size, precision(name)).moments()
    assert [(sorted(m.allocated), m.live) for m in ours] == [(sorted(m.allocated), m.live) for m in real]
