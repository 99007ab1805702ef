"""What a spec accepts and refuses, and how options override presets."""

import pytest

from simtrain.core.errors import InputError, UnknownNameError
from workloads.transformer import build_module, spec
from workloads.transformer.spec import TransformerSpec

GOOD = {"layers": 2, "hidden": 12, "heads": 3, "vocabulary": 10, "max_positions": 8, "sequence": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "5 heads do not divide a hidden size of 12"),
        ({"kv_heads": 2}, "2 key and value heads do not divide 3 query heads"),
        ({"sequence": 9}, "sequence length 9 exceeds the 8 positions"),
        ({"sequence": 0}, "sequence must be at least 1"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"layers": 1.5}, "layers must be a whole number, not 1.5"),
        ({"layers": True}, "layers must be a whole number, not True"),
        ({"ffn": -1}, "ffn must not be negative"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"activation": "swigl"}, "activation 'swigl' is unknown: did you mean 'swiglu'"),
        ({"norm": "batch"}, "norm 'batch' is unknown"),
        ({"causal": "yes"}, "causal must be of type bool"),
        ({"positions": "rotary"}, "separate projections"),
        ({"positions": "rotary", "fused_qkv": False, "head_dim": 3}, "even head size, not 3"),
        ({"top_k": 2}, "top_k=2 is for a mixture of experts: give experts and top_k too"),
        ({"load": 1.5}, "load=1.5 is for a mixture of experts"),
        ({"experts": 4, "top_k": 5, "bias": False}, "top_k must lie between 1 and the 4 experts, not 5"),
        ({"experts": 4, "bias": False}, "top_k must lie between 1 and the 4 experts, not 0"),
        ({"experts": 4, "top_k": 2, "bias": False, "load": 0.5}, "at least 1, not 0.5"),
        ({"experts": 4, "top_k": 2, "bias": False, "dense_layers": 2}, "no block of 2 has experts with dense_layers=2"),
        ({"experts": 4, "top_k": 2}, "experts have no biases: set bias = false"),
        ({"experts": 4, "top_k": 2, "bias": False, "dropout": 0.1}, "dropout beside experts is not modelled"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TransformerSpec(**(GOOD | changes))


def test_a_dropout_given_as_a_whole_number_is_fine() -> None:
    assert TransformerSpec(**GOOD, dropout=0).dropout == 0


def test_derived_widths() -> None:
    made = TransformerSpec(**GOOD, kv_heads=1)
    assert (made.size_of_head, made.query_width, made.kv_width, made.ffn_width) == (4, 12, 4, 48)
    wide = TransformerSpec(**GOOD, head_dim=10, ffn=7)
    assert (wide.query_width, wide.kv_width, wide.ffn_width) == (30, 30, 7)


def test_options_override_a_preset_and_shorten_its_sequence() -> None:
    made = spec("gpt2-small", layers=3, max_positions=64)
    assert (made.layers, made.hidden, made.sequence) == (3, 768, 64)


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="no option 'hiden': did you mean 'hidden'"):
        spec("gpt2-small", hiden=3)


def test_missing_sizes_are_named() -> None:
    with pytest.raises(InputError, match="needs hidden, heads"):
        TransformerSpec.from_options({}, {"layers": 2, "vocabulary": 5, "max_positions": 4})


def test_presets_are_found_by_alias_and_in_any_spelling() -> None:
    assert spec("GPT-2 124M") == spec("gpt2-small")
    with pytest.raises(UnknownNameError, match="gpt2-small"):
        spec("gpt2-smal")


def test_build_module_takes_a_spec_or_a_name() -> None:
    small = spec("gpt", layers=1, hidden=8, heads=2, vocabulary=11, max_positions=4)
    by_spec = build_module(small)
    by_name = build_module("gpt", layers=1, hidden=8, heads=2, vocabulary=11, max_positions=4, attention="unfused")
    assert [p.shape for p in by_spec.parameters()] == [p.shape for p in by_name.parameters()]


def test_an_example_batch_too_long_for_the_model_is_refused() -> None:
    from workloads.transformer.module import example_batch

    ids, targets = example_batch(TransformerSpec(**GOOD), batch=2, seq=5)
    assert ids.shape == targets.shape == (2, 5)
    span = TransformerSpec(**GOOD, head="span")
    assert example_batch(span, batch=2)[1].shape == (2, 2)
    with pytest.raises(InputError, match="exceeds"):
        example_batch(span, batch=2, seq=9)
