"""What must hold of any operator lists, and of the parts that the CPU cannot check (dropout and casts as on CUDA)."""

from collections import Counter

import pytest

from simtrain.core.precision import DTypeRole, precision
from simtrain.core.workload import Form, Layer, Operator, OperatorKind, Role, TensorKind
from tests.workloads.list_replay import Replay, unfuse
from workloads.transformer.operators import block, embedding, head, workload
from workloads.transformer.part import Part
from workloads.transformer.presets import FAMILY, spec
from workloads.transformer.spec import TransformerSpec

SMALL = {"layers": 2, "hidden": 64, "heads": 4, "vocabulary": 96, "max_positions": 32}
VARIANTS = {name: FAMILY.presets[name] for name in ("gpt2-small", "llama3-8b", "bert-large", "gpt", "llama", "bert")}


def part(whole: TransformerSpec) -> Part:
    return Part(whole, Form())


def passes(layer: Layer) -> list[tuple[Operator, ...]]:
    return [layer.forward, layer.backward, unfuse(layer.forward), unfuse(layer.backward)]


@pytest.mark.parametrize("name", VARIANTS)
def test_operator_names_are_unique_in_their_pass(name: str) -> None:
    for layer in VARIANTS[name]().layers:
        for operators in passes(layer):
            assert [n for n, count in Counter(op.name for op in operators).items() if count > 1] == []


@pytest.mark.parametrize("unfused", [False, True])
@pytest.mark.parametrize("recipe", ["fp32", "bf16-amp", "bf16", "fp16-amp"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_written_once_and_before_it_is_read(name: str, recipe: str, unfused: bool) -> None:
    moments = Replay(VARIANTS[name](), 1, precision(recipe), unfused=unfused).moments()
    assert all(m.live > 0 for m in moments)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient_of_its_size(name: str) -> None:
    for layer in VARIANTS[name]().layers:
        gradients = {t.name: t.elements(1, 1) for op in layer.backward for t in op.writes}
        for parameter in layer.parameters:
            assert gradients["shared:dwte" if parameter.tied_to else f"grad:{parameter.name}"] == parameter.elements


@pytest.mark.parametrize("name", VARIANTS)
def test_partial_reads_are_reads(name: str) -> None:
    for layer in VARIANTS[name]().layers:
        for operators in passes(layer):
            assert all(set(op.partial) <= set(op.reads) for op in operators)


def test_first_layer_hands_no_gradient_down_and_the_others_do() -> None:
    layers = (
        embedding(part(spec("gpt"))),
        block(part(spec("gpt"))),
        head(part(spec("gpt"))),
    )
    written = [{t.name for op in layer.backward for t in op.writes} for layer in layers]
    assert ["dx" in names for names in written] == [False, True, True]


def test_weights_are_cast_once_and_activations_where_they_enter_a_matrix_product() -> None:
    casts = [op.reads[0] for op in block(part(spec("llama"))).forward if op.kind is OperatorKind.CAST]
    assert casts.count("n1") == 3  # one for each projection: autocast keeps casts of parameters only
    assert casts.count("n2") == 2
    assert casts.count("attention.q.weight") == 1


def test_dropout_writes_a_mask_of_one_byte_per_element() -> None:
    with_dropout = block(part(spec("gpt", dropout=0.1)))
    masks = [t for op in with_dropout.forward for t in op.writes if t.role is DTypeRole.MASK]
    assert [m.name for m in masks] == ["a.dropped.mask", "m.dropped.mask"]
    assert all(m.elements(3, 5) == 3 * 5 * 256 for m in masks)
    assert not [t for op in block(part(spec("gpt"))).forward for t in op.writes if t.role is DTypeRole.MASK]


def test_unfused_attention_drops_out_probabilities() -> None:
    written = {t.name: t for op in unfuse(block(part(spec("bert"))).forward) for t in op.writes}
    assert written["weights.dropped.mask"].elements(2, 8) == 2 * 4 * 8 * 8


def test_attention_flops_are_two_products_forward_and_five_backward() -> None:
    layer = block(part(spec("gpt", **SMALL)))
    forward = next(op for op in layer.forward if op.kind is OperatorKind.ATTENTION)
    backward = next(op for op in layer.backward if op.kind is OperatorKind.ATTENTION_BACKWARD)
    product = 2 * 3 * 32 * 32 * 64
    assert (forward.flops(3, 32), backward.flops(3, 32)) == (2 * product, 5 * product)
    assert forward.causal
    assert backward.causal


def test_dimensions_say_what_is_sharded() -> None:
    layer = block(part(spec("gpt")))
    gemms = {op.name: [d.role for d in op.dims] for op in layer.forward if op.kind is OperatorKind.GEMM}
    assert gemms["attention.qkv"] == [Role.BATCH, Role.TOKENS, Role.HEADS, Role.HIDDEN]
    assert gemms["attention.proj"] == [Role.BATCH, Role.TOKENS, Role.HIDDEN, Role.HEADS]
    assert gemms["mlp.fc1"] == [Role.BATCH, Role.TOKENS, Role.FFN, Role.HIDDEN]
    assert gemms["mlp.fc2"] == [Role.BATCH, Role.TOKENS, Role.HIDDEN, Role.FFN]


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_of_a_matrix_product_follow_from_its_dimensions(name: str) -> None:
    for layer in VARIANTS[name]().layers:
        for op in unfuse(layer.forward + layer.backward):
            if op.kind in (OperatorKind.GEMM, OperatorKind.BATCHED_GEMM):
                batch, m, n, k = (d.size(2, 64) for d in op.dims)
                assert op.flops(2, 64) == 2 * batch * m * n * k


def test_logits_are_counted_as_logits() -> None:
    kinds = {t.name: t.kind for op in head(part(spec("gpt"))).forward + head(part(spec("gpt"))).backward for t in op.writes}
    logits = {"logits", "logits.fp32", "log_probabilities", "dlog_probabilities", "dlogits.fp32", "dlogits"}
    assert {n for n, kind in kinds.items() if kind is TensorKind.LOGITS} == logits


def test_saved_activations_of_a_gpt_block_match_the_published_count() -> None:
    """Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1: 34 bytes per token and hidden unit, of which 2 are dropout masks.

    The scores are not stored; instead there are 4 bytes per head and token, and 16 bytes per token for the two norms.
    """
    gpt = spec("gpt", **SMALL)
    one, two = (Replay(workload(spec("gpt", **SMALL | {"layers": n})), 2, precision("bf16")).saved() for n in (1, 2))
    tokens = 2 * 32
    statistics = 4 * 4 * tokens
    log_sum_exp = 4 * gpt.heads * tokens
    assert sum(two) - sum(one) == 32 * tokens * gpt.hidden + statistics + log_sum_exp
