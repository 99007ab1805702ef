"""Presets against published numbers, and the catalog as a user meets it."""

import subprocess
import sys

import pytest

from simtrain.core import catalog
from simtrain.core.errors import InputError, UnknownNameError, fold
from workloads.catalog import workloads
from workloads.transformer.presets import spec

PUBLISHED = {
    # GPT-2: sizes of the released checkpoints; Llama 3: parameters of the released weights; BERT: without pooler, vocabulary padded by 6.
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    # Parameters as printed by llm-foundry's benchmarking table, the Llama 2 weights, and BLOOM's paper (table 3)
    "mpt-125m": 125_311_488,
    "mpt-350m": 355_985_408,
    "mpt-1b": 1_315_950_592,
    "mpt-3b": 2_651_837_440,
    "mpt-13b": 12_853_954_560,
    "mpt-70b": 64_862_437_376,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    # Mixtral and DeepSeekMoE: parameters of the released weights (recalled, not looked up)
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-moe-16b": 16_375_728_128,
    "bloom": 176_247_271_424,
    "bert-base": 108_891_648 + 6 * 768 + 2 * 769,
    "bert-large": 334_092_288 + 6 * 1024 + 2 * 1025,
    # torchvision's documentation of its weights, and timm's table of results
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vit-tiny": 5_717_416,
    "vit-small": 22_050_664,
    "vit-base": 86_567_656,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert catalog.workload(name).parameter_count == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "billions", "rel"),
    [
        ("gpt3-175b", 175, 0.005),
        ("gpt3-13b", 13, 0.015),
        ("gpt3-6.7b", 6.7, 0.01),
        ("gpt3-1.3b", 1.3, 0.015),
        ("gpt3-125m", 0.125, 0.005),
        ("megatron-1.7b", 1.7, 0.03),
        ("megatron-3.6b", 3.6, 0.015),
        ("megatron-7.5b", 7.5, 0.005),
        ("megatron-18.4b", 18.4, 0.005),
        ("megatron-39.1b", 39.1, 0.001),
        ("megatron-76.1b", 76.1, 0.001),
        ("megatron-145.6b", 145.6, 0.001),
        ("megatron-310.1b", 310.1, 0.001),
        ("megatron-529.6b", 529.6, 0.001),
        ("megatron-1t", 1008, 0.001),
        ("megatron-22b", 22, 0.02),
        ("llama3.1-405b", 405.9, 0.001),
        ("nemotron4-15b", 15.6, 0.005),
        ("internlm-7b", 7.3, 0.005),
        ("mpt-7b", 6.65, 0.005),
        ("mixtral-8x22b", 141, 0.005),
        ("qwen3-30b-a3b", 30.5, 0.005),
        ("qwen3-235b-a22b", 235, 0.005),
        ("dbrx", 132, 0.005),
        ("grok-1", 314, 0.006),
        ("deepseek-v3", 671, 0.001),
    ],
)
def test_models_have_their_names_in_parameters(name: str, billions: float, rel: float) -> None:
    assert catalog.workload(name).parameter_count == pytest.approx(billions * 1e9, rel=rel)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 12.9),
        ("mixtral-8x22b", 39),
        ("qwen3-30b-a3b", 3.3),
        ("qwen3-235b-a22b", 22),
        ("dbrx", 36),
        ("deepseek-moe-16b", 2.8),
        ("deepseek-v3", 37),
    ],
)
def test_a_token_meets_as_many_parameters_as_published(name: str, billions: float) -> None:
    """Active parameters as the models' authors round them; products of a token are twice that many, its table's rows left out."""
    made, work = spec(name), catalog.workload(name)
    inside = sum(p.elements * layer.repeats for layer in work.layers for p in layer.parameters if p.expert)
    active = work.parameter_count - inside * (1 - made.top_k / made.experts)
    assert active == pytest.approx(billions * 1e9, rel=0.02)
    attention = 12 * made.layers * (made.query_width + made.rotary_width / 2) * work.sequence
    token = 6 * (active - made.vocabulary * made.hidden) + attention
    assert work.model_flops(1) / work.sequence == pytest.approx(token, rel=0.002)


def test_no_two_presets_are_one_name_in_other_spellings() -> None:
    spellings = [n for name, preset in workloads().items() for n in {fold(n) for n in (name, *getattr(preset, "aliases", ()))}]
    assert len(spellings) == len(set(spellings))


def test_flops_of_gpt3_are_about_six_per_parameter_and_token() -> None:
    work = catalog.workload("gpt3-175b")
    attention = 12 * 96 * 12288 * 2048
    # Table D.1 of Brown et al. 2020 counts six per parameter and token and leaves attention (here 3 %) and the embedding's lookup out.
    assert work.model_flops(1) / work.sequence == pytest.approx(6 * work.parameter_count + attention, rel=0.002)


@pytest.mark.parametrize("name", sorted(workloads()))
def test_every_preset_says_where_it_comes_from(name: str) -> None:
    work = catalog.workload(name)
    assert work.source
    assert work.name == name
    first = "stem" if work.name.startswith("resnet") else "embedding"
    assert (work.layers[0].name, work.layers[-1].name) == (first, "head")
    assert work.input_bytes(2, work.sequence) > 0


FORWARD_GMACS = {"resnet18": 1.82, "resnet34": 3.67, "resnet50": 4.11, "vit-tiny": 1.26, "vit-small": 4.61, "vit-base": 17.58}
"""Products of a forward pass of one image, counted by fvcore (timm's table of results; pooling and norms are in it)."""


@pytest.mark.parametrize("name", FORWARD_GMACS)
def test_forward_flops_of_image_models_are_the_published_ones(name: str) -> None:
    work = catalog.workload(name)
    forward = sum(op.flops(1, work.sequence) for layer in work for op in layer.forward)
    assert forward / 2e9 == pytest.approx(FORWARD_GMACS[name], rel=0.015)


def test_layers_of_a_residual_network_are_its_distinct_blocks() -> None:
    layers = {layer.name: layer for layer in catalog.workload("resnet50").layers}
    assert {name: layer.repeats for name, layer in layers.items() if layer.repeats > 1} == {
        "stage1.rest": 2,
        "stage2.rest": 3,
        "stage3.rest": 5,
        "stage4.rest": 2,
    }
    assert [name for name in layers if name.startswith("stage1")] == ["stage1.first", "stage1.rest"]
    assert [layer.name for layer in catalog.workload("resnet18").layers][1:3] == ["stage1", "stage2.first"]
    assert not layers["stage1.rest"].safe_to_recompute
    assert catalog.workload("resnet50", recomputable=True).layers[1].safe_to_recompute


def test_images_have_the_length_of_their_patches_and_no_other() -> None:
    assert (catalog.workload("vit-base").sequence, catalog.workload("resnet50").sequence) == (197, 1)
    assert catalog.workload("vit-base", image_size=384).sequence == 577
    assert catalog.workload("resnet50", seq_len=1).sample_unit == "image"
    with pytest.raises(InputError, match="197 tokens per image, not 128: give image_size"):
        catalog.workload("vit-base", seq_len=128)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {"depth": 49}, "depth 49 is unknown"),
        ("resnet50", {"stem": "cifa"}, "did you mean 'cifar'"),
        ("resnet50", {"layers": 3}, "a convolutional network has no option 'layers'"),
        ("resnet", {"width": 0}, "width must be at least 1, not 0"),
        ("vit-base", {"patch": 15}, "patches of 15 pixels do not divide an image of 224"),
        ("vit-base", {"heads": 5}, "5 heads do not divide"),
    ],
)
def test_image_models_refuse_what_they_cannot_be(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalog.workload(name, **options)


def test_input_bytes_of_images_are_fp32_pixels_and_a_class() -> None:
    assert catalog.workload("resnet50").input_bytes(2, 1) == 2 * (4 * 3 * 224 * 224 + 8)


def test_aliases_and_spellings() -> None:
    for text in ("gpt2", "GPT-2 Small", "gpt2-124m"):
        assert catalog.workload(text).name == "gpt2-small"
    assert catalog.workload("ResNet-50").name == "resnet50"
    assert catalog.workload("vit_base_patch16_224").name == "vit-base"
    with pytest.raises(UnknownNameError, match="llama3-8b"):
        catalog.workload("lama3-8b")


def test_sequence_length_and_options() -> None:
    work = catalog.workload("gpt2-small", seq_len=256, layers=6)
    assert (work.sequence, work.depth) == (256, 8)
    assert "layers=6" in work.description
    assert "changed" not in catalog.workload("gpt2-small").description


def test_too_long_a_sequence_and_unknown_options_are_refused() -> None:
    with pytest.raises(InputError, match="2048 exceeds the 1024 positions"):
        catalog.workload("gpt2-small", seq_len=2048)
    assert catalog.workload("gpt2-small", seq_len=2048, max_positions=2048).sequence == 2048
    with pytest.raises(InputError, match="did you mean 'vocabulary'"):
        catalog.workload("gpt", vocabulry=5)


def test_bert_span_targets_are_two_numbers_per_sample() -> None:
    assert catalog.workload("bert-base").input_bytes(4, 384) == 8 * (4 * 384 + 2 * 4)
    assert catalog.workload("gpt2-small").input_bytes(4, 1024) == 8 * 2 * 4 * 1024


def test_the_catalog_does_not_import_torch() -> None:
    code = (
        "import sys, workloads.catalog, workloads.transformer, workloads.convnet, workloads.vit; "
        "workloads.catalog.workloads(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
