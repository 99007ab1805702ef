"""Fused elementwise chains and the frameworks' behaviours that change prices, against counts of bytes by hand."""

from __future__ import annotations

import pytest

import simtrain as st
from simtrain.core.errors import InputError
from simtrain.core.precision import precision
from simtrain.core.runtimes import runtime
from simtrain.core.workload import Form, OperatorKind
from simtrain.step.fuse import fused_operators
from simtrain.step.kernels import operator_kernels
from simtrain.step.specialize import specialize


def block(form=None, **options):
    work = st.workload("gpt", layers=2, hidden=1024, heads=16, vocabulary=32000, seq_len=512, **options)
    layer = (work if form is None else work.reform(form)).layers[1]
    return specialize(layer, precision("bf16-master"), False)


def test_dropout_and_residual_sum_are_one_kernel():
    concrete = block(dropout=0.1)
    fused = {op.name: op for op in fused_operators(concrete.forward, concrete)}
    batch, elements = 4, 4 * 512 * 1024
    kernels = operator_kernels([fused["y.add"]], concrete, batch, 512)
    assert "m.dropped.dropout" not in fused
    assert kernels.bytes_moved[0] == pytest.approx((2 + 2 + 2 + 1) * elements)  # reads both, writes the sum and a mask of one byte


def test_scale_and_mask_join_the_softmax_both_ways():
    concrete = block(dropout=0.0)
    forward = {op.name: op for op in fused_operators(concrete.forward, concrete)}
    backward = {op.name: op for op in fused_operators(concrete.backward, concrete)}
    square = 2 * 16 * 512 * 512
    assert not {"scaled", "masked"} & set(forward)
    assert not {"masked.backward", "weights.backward"} & set(backward)
    assert operator_kernels([forward["weights"]], concrete, 2, 512).bytes_moved[0] == pytest.approx(2 * 2 * square, rel=0.1)
    assert operator_kernels([backward["scaled.backward"]], concrete, 2, 512).bytes_moved[0] == pytest.approx(3 * 2 * square, rel=0.1)


def streams(operators, concrete):
    """Bytes beside products, attention and casts of weights, in 16-bit streams of a block's width."""
    skipped = {OperatorKind.GEMM, OperatorKind.ATTENTION, OperatorKind.ATTENTION_BACKWARD}
    own = [op for op in operators if op.kind not in skipped and ".weight.low" not in op.name and ".bias.low" not in op.name]
    return operator_kernels(own, concrete, 2, 1024).bytes_moved.sum() / (2 * 1024 * 768 * 2)


def test_compiled_blocks_move_what_inductor_states():
    """Sizes of buffers in the scheduler of PyTorch 2.13's inductor for a block of GPT-2 with autocast's formats: 21 and 53 streams.

    Its x1 is computed again rather than stored, and its gradients of a norm's weights read the 16-bit gradient before the cast.
    """
    work = st.workload("gpt2-small", seq_len=1024)
    concrete = specialize(work.layers[1], precision("bf16-amp"), True)
    chains = {
        norms: [fused_operators(ops, concrete, norms=norms) for ops in (concrete.forward, concrete.backward)] for norms in (False, True)
    }
    forward, backward = (streams(ops, concrete) for ops in chains[True])
    assert forward == pytest.approx(21, abs=1.5)
    assert backward == pytest.approx(53, abs=2.5)
    assert [streams(ops, concrete) for ops in chains[False]] > [1.4 * forward, 1.1 * backward]
    written = [{w.name for op in ops for w in op.writes} for ops in chains[True]]
    assert "x1" in written[0]  # other operators read it too
    assert "n1" not in written[0]
    assert {p.name for p in concrete.layer.parameters} == {
        name.removeprefix("grad:") for name in written[1] if name in {f"grad:{p.name}" for p in concrete.layer.parameters}
    }


def test_compiled_loss_reads_logits_and_writes_their_gradient_once():
    """In inductor's scheduler the loss reads the logits for each of two sums per row, and backward moves them twice: 4 passes, not 10.

    The second reading hits the cache, so 3 are counted.
    """
    tokens, classes = 4 * 512, 32000
    moved = {}
    for loss in ("torch", "compiled"):
        work = st.workload("gpt", layers=2, hidden=1024, heads=16, vocabulary=classes, seq_len=512).reform(Form(loss=loss))
        concrete = specialize(work.layers[-1], precision("bf16-amp"), True)
        ops = [*fused_operators(concrete.forward, concrete, norms=True), *fused_operators(concrete.backward, concrete, norms=True)]
        own = [op for op in ops if op.kind is not OperatorKind.GEMM and "linear" not in op.name and "norm." not in op.name]
        moved[loss] = operator_kernels(own, concrete, 4, 512).bytes_moved.sum() / (2 * tokens * classes)
    assert moved["compiled"] == pytest.approx(3, rel=0.05)
    assert moved["torch"] == pytest.approx(10, rel=0.05)


def test_fusion_never_adds_bytes_and_keeps_products():
    concrete = block(dropout=0.1)
    for operators in (concrete.forward, concrete.backward):
        fused = fused_operators(operators, concrete)
        before, after = (operator_kernels(ops, concrete, 4, 512) for ops in (operators, fused))
        assert after.bytes_moved.sum() < before.bytes_moved.sum()
        assert len(fused) < len(operators)
        assert after.flops.sum() == before.flops.sum()
        assert [o.name for o in fused if o.kind is OperatorKind.GEMM] == [o.name for o in operators if o.kind is OperatorKind.GEMM]


def test_gated_activation_moves_eight_tensors():
    concrete = block(Form(fused_gate=True), activation="swiglu", ffn=2048)
    ops = [op for op in (*concrete.forward, *concrete.backward) if ".gated" in op.name]
    moved = operator_kernels(ops, concrete, 1, 512).bytes_moved
    assert moved.tolist() == [3 * 2 * 512 * 2048, 5 * 2 * 512 * 2048]


@pytest.mark.parametrize("tensor", [1, 4])
def test_a_fused_loss_reads_the_logits_twice_and_writes_them_once(tensor):
    """In their own format, where Megatron-LM's chain converts them to fp32 and passes over them eight times."""
    work = st.workload("gpt", layers=2, hidden=1024, heads=16, vocabulary=32000, seq_len=512)
    logits = 4 * 512 * 32000 / tensor * 2
    moved = {}
    for loss in ("fused", "in-place"):
        concrete = specialize(work.reform(Form(tensor=tensor, loss=loss)).layers[-1], precision("bf16-master"), False)
        ops = [
            op
            for op in (*concrete.forward, *concrete.backward)
            if op.kind in (OperatorKind.REDUCTION, OperatorKind.ELEMENTWISE, OperatorKind.CAST)
        ]
        moved[loss] = operator_kernels(ops, concrete, 4, 512).bytes_moved.sum() / logits
    assert moved["fused"] == pytest.approx(3, rel=0.01)
    assert moved["in-place"] > 5 * moved["fused"]


def test_unknown_losses_are_refused():
    with pytest.raises(InputError, match="loss must be torch or in-place or fused"):
        runtime("megatron").with_(loss="apex")


def test_blocking_launches_add_host_time_and_slow_attention_its_share():
    work = st.workload("gpt", layers=4, hidden=1024, heads=16, vocabulary=32000, seq_len=1024)
    base = runtime("megatron")

    def time_s(framework):
        return st.estimate(work, "a100-sxm-80g", "micro_batch=8,precision=bf16-master", runtime=framework).step_time_s

    assert time_s(base.with_(blocking_launches=True)) > time_s(base)
    assert time_s(base.with_(attention_speed=0.5)) > time_s(base) > time_s(base.with_(attention_speed=1.5))
    with pytest.raises(InputError, match="attention_speed"):
        base.with_(attention_speed=0.0)


def test_older_libraries_slow_matrix_products_on_hopper_alone():
    work = st.workload("gpt", layers=4, hidden=2048, heads=16, vocabulary=32000, seq_len=1024)
    base = runtime("fsdp2")
    old = base.with_(hopper_products=0.8)

    def time_s(device, framework):
        return st.estimate(work, device, "micro_batch=8,precision=bf16-master", runtime=framework).step_time_s

    assert time_s("a100-sxm-80g", old) == time_s("a100-sxm-80g", base)
    assert 1.05 < time_s("h100-sxm", old) / time_s("h100-sxm", base) < 1.25
    with pytest.raises(InputError, match="hopper_products"):
        base.with_(hopper_products=0.0)
