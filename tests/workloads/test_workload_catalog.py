"""Presets against published numbers, and the catalog as a user meets it."""

import subprocess
import sys

import pytest

from simtrain.core import catalog
from simtrain.core.errors import InputError, UnknownNameError
from workloads.catalog import workloads

PUBLISHED = {
    # GPT-2: sizes of the released checkpoints; Llama 3: parameters of the released weights; BERT: without pooler, vocabulary padded by 6.
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "bert-base": 108_891_648 + 6 * 768 + 2 * 769,
    "bert-large": 334_092_288 + 6 * 1024 + 2 * 1025,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert catalog.workload(name).parameter_count == PUBLISHED[name]


def test_gpt3_has_its_name_in_parameters() -> None:
    assert catalog.workload("gpt3-175b").parameter_count == pytest.approx(175e9, rel=0.005)


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
    assert [layer.name for layer in work.layers] == ["embedding", "block", "head"]
    assert work.input_bytes(2, work.sequence) > 0


def test_aliases_and_spellings() -> None:
    for text in ("gpt2", "GPT-2 Small", "gpt2-124m"):
        assert catalog.workload(text).name == "gpt2-small"
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
    code = "import sys, workloads.catalog, workloads.transformer; workloads.catalog.workloads(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
