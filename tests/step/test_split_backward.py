"""The two parts of a backward pass: nothing lost, nothing used before it is there, the work where theory puts it."""

from dataclasses import replace

import pytest

import simtrain as st
from simtrain.core.polynomial import B
from simtrain.core.precision import precision
from simtrain.core.runtimes import RUNTIMES
from simtrain.core.workload import Layer, Operator, OperatorKind, Parameter, Tensor
from simtrain.step.kernels import operator_kernels
from simtrain.step.specialize import concrete_layers, specialize
from simtrain.step.split_backward import split_backward

BATCH = 4
FAMILIES = ["gpt2-small", "bert-base", "llama3-8b", "resnet18", "resnet50", "vit-tiny"]
PRODUCTS = (OperatorKind.GEMM, OperatorKind.CONVOLUTION, OperatorKind.CONVOLUTION_BACKWARD)


def layers(name: str, recipe: str = "bf16-amp", *, fused: bool = True):
    workload = st.workload(name)
    return workload, concrete_layers(workload, precision(recipe), RUNTIMES["torch-eager"].with_(fused_attention=fused))


cases = pytest.mark.parametrize(
    ("name", "recipe", "fused"), [(n, r, f) for n in FAMILIES for r, f in (("fp16-amp", True), ("fp32", True), ("bf16", False))]
)


def made(operators) -> set[str]:
    return {w.name for op in operators for w in op.writes}


@cases
def test_the_parts_are_the_whole(name, recipe, fused):
    workload, concretes = layers(name, recipe, fused=fused)
    for c in concretes:
        parts = split_backward(c)
        together = parts.input_gradient + parts.weight_gradient
        assert sorted(w.name for op in together for w in op.writes) == sorted(w.name for op in c.backward for w in op.writes)
        assert sum(op.launches for op in together) == sum(op.launches for op in c.backward)
        flops = sum(op.flops(BATCH, workload.sequence) for op in together)
        assert flops == pytest.approx(sum(op.flops(BATCH, workload.sequence) for op in c.backward))
        whole = {op.name for op in c.backward}
        assert [op.name.removesuffix(".input") for op in parts.input_gradient if op.name.removesuffix(".input") in whole] == [
            op.name for op in c.backward if op.name in {o.name.removesuffix(".input") for o in parts.input_gradient}
        ]


@cases
def test_what_a_part_reads_is_there(name, recipe, fused):
    for c in layers(name, recipe, fused=fused)[1]:
        parts = split_backward(c)
        held = {p.name for p in c.layer.parameters} | {"dy"}
        there = held | set(c.saved)
        for op in parts.input_gradient:
            assert all(r in there or r.startswith(("input:", "shared:")) for r in op.reads), op.name
            there |= made((op,))
        assert not any(w.startswith("grad:") and "." not in w for w in made(parts.input_gradient))
        later = held - {"dy"} | set(parts.kept)
        for op in parts.weight_gradient:
            assert all(r in later or r.startswith("input:") for r in op.reads), op.name
            later |= made((op,))
        assert parts.kept <= there | {r for r in parts.kept if r.startswith("shared:")}
        assert parts.made_between == parts.kept & made(parts.input_gradient)
        assert not made(parts.weight_gradient) & {"dx"}


@cases
def test_all_that_is_handed_on_comes_first(name, recipe, fused):
    for c in layers(name, recipe, fused=fused)[1]:
        parts = split_backward(c)
        everything = made(c.backward)
        handed_on = {n for n in everything if n == "dx" or n.startswith("shared:")}
        assert handed_on <= made(parts.input_gradient)
        wanted = set(handed_on)
        for op in reversed(parts.input_gradient):  # and nothing runs there that it does not need
            assert wanted & made((op,)), op.name
            wanted |= set(op.reads)


@pytest.mark.parametrize("name", ["gpt2-small", "llama3-8b", "vit-tiny"])
def test_linear_layers_are_halved_and_attention_comes_first(name):
    workload, concretes = layers(name)
    block = next(c for c in concretes if c.layer.block)
    parts = split_backward(block)

    def flops(operators, *kinds) -> float:
        return sum(op.flops(BATCH, workload.sequence) for op in operators if op.kind in kinds)

    assert flops(parts.input_gradient, OperatorKind.GEMM) == flops(parts.weight_gradient, OperatorKind.GEMM) > 0
    assert flops(parts.input_gradient, OperatorKind.ATTENTION_BACKWARD) == flops(block.backward, OperatorKind.ATTENTION_BACKWARD) > 0
    kinds = {op.kind for op in parts.weight_gradient}
    assert not kinds & {OperatorKind.NORM_BACKWARD, OperatorKind.SOFTMAX_BACKWARD, OperatorKind.BATCHED_GEMM}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_convolutions_are_halved(name):
    workload, concretes = layers(name, "fp32")
    for c in concretes:
        if c.layer.name in ("stem", "head"):
            continue
        parts = split_backward(c)
        halves = [sum(op.flops(BATCH, workload.sequence) for op in half) for half in (parts.input_gradient, parts.weight_gradient)]
        assert halves[0] == pytest.approx(halves[1])
        forward = sum(op.flops(BATCH, workload.sequence) for op in c.forward)
        assert halves[0] == pytest.approx(forward)


def test_kept_activations_of_a_block_are_what_its_linear_layers_read():
    """Qi et al. 2023, table 1: the weight part holds the inputs of the four products and the gradients of their outputs."""
    workload, concretes = layers("gpt2-small", "bf16")
    block = next(c for c in concretes if c.layer.block)
    parts = split_backward(block)
    hidden = 768 * workload.sequence * BATCH

    def elements(names) -> float:
        return sum(block.tensors[n].elements(BATCH, workload.sequence) if n in block.tensors else hidden for n in names)

    # qkv, projection, fc1, fc2 read 1 + 1 + 1 + 4 hidden sizes and hand back 3 + 1 + 4 + 1
    assert elements(parts.kept - parts.made_between - {"dy"}) == 7 * hidden
    assert elements(parts.made_between | (parts.kept & {"dy"})) == 9 * hidden


def test_first_layers_and_tied_weights():
    _, concretes = layers("gpt2-small")
    embedding, head = concretes[0], concretes[-1]
    assert split_backward(embedding).input_gradient == ()  # nobody is in front of it
    assert split_backward(head).weight_gradient == ()  # the embedding adds the gradient of the tied weight
    alone = split_backward(head, handed_on=("dx",))
    assert "linear.dw" in {op.name for op in alone.weight_gradient}
    assert {op.name for op in alone.input_gradient} >= {"linear.dx", "norm.backward"}


def test_convolution_parts_are_priced_apart():
    """The weight part alone reads as the first layer of a network, whose images get no gradient."""
    workload, concretes = layers("resnet18")
    stage = concretes[1]
    parts = split_backward(stage)
    kernels = operator_kernels(parts.weight_gradient, stage, BATCH, workload.sequence)
    chosen = kernels.mask(OperatorKind.CONVOLUTION_BACKWARD)
    assert chosen.sum() == 2
    one_product = 2 * kernels.batch * kernels.m * kernels.n * kernels.k
    assert kernels.flops[chosen] == pytest.approx(one_product[chosen])


def test_what_reads_a_tensor_before_it_is_overwritten_stays_in_front():
    size = B * 8
    layer = Layer(
        "in place",
        forward=(Operator("f", OperatorKind.ELEMENTWISE, ("x", "w"), (Tensor("y", size), Tensor("s", size))),),
        backward=(
            Operator("first", OperatorKind.ELEMENTWISE, ("dy",), (Tensor("d", size),)),
            Operator("dw", OperatorKind.REDUCTION, ("d", "s"), (Tensor("grad:w", size),)),
            Operator("scale", OperatorKind.ELEMENTWISE, ("s",), updates=("d",)),
            Operator("dx", OperatorKind.ELEMENTWISE, ("d",), (Tensor("dx", size),)),
        ),
        parameters=(Parameter("w", (8,)),),
        cut=size,
    )
    parts = split_backward(specialize(layer, precision("fp32"), True))
    assert [op.name for op in parts.input_gradient] == ["first", "dw", "scale", "dx"]
    without = replace(
        layer, backward=(*layer.backward[:2], replace(layer.backward[2], updates=(), writes=(Tensor("e", size),)), *layer.backward[3:])
    )
    parts = split_backward(specialize(without, precision("fp32"), True))
    assert [op.name for op in parts.weight_gradient] == ["dw", "scale"]  # nobody needs what it writes
    assert parts.kept == {"d", "s"}
    assert parts.made_between == {"d"}
