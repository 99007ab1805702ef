"""Passes of DeepSpeed's fp16 optimizer around its update, against bytes counted by hand."""

import pytest

import simtrain as st
from simtrain.core.precision import precision
from simtrain.core.runtimes import runtime
from simtrain.step.kernels import FLAT_GRADIENT_BYTES, optimizer_kernels

DEEPSPEED = runtime("deepspeed")


def test_passes_around_the_update_are_counted_per_parameter_and_tensor():
    sizes = [1000, 24]
    plain, flat = (optimizer_kernels(sizes, "adamw", precision("fp16-master"), DEEPSPEED, flat=flat) for flat in (False, True))
    update, unscale = 28 * 1024, 2 * 2 * 1024
    assert plain.bytes_moved.sum() == update + unscale
    assert flat.bytes_moved.sum() == update + FLAT_GRADIENT_BYTES * 1024
    assert flat.launches.sum() - flat.launches[0] == 4 * len(sizes)


def test_only_fp16_without_zero_lays_gradients_flat():
    work = st.workload("gpt", layers=2, hidden=1024, heads=16, vocabulary=8192, seq_len=128)

    def both(how):
        return [
            st.estimate(work, "8x a100-sxm-80g", f"data=8,{how}", runtime=DEEPSPEED.with_(flat_gradients=flat)) for flat in (True, False)
        ]

    flat, plain = both("precision=fp16-master")
    assert flat.step_time_s > plain.step_time_s
    # casts of all gradients and what they are laid into, 4 bytes each, where the update is the fullest moment
    held = 8 * sum(layer.repeats * p.elements for layer in work.layers for p in layer.parameters if p.tied_to is None)
    assert flat.memory.allocated_bytes - plain.memory.allocated_bytes == pytest.approx(held, rel=0.5)
    assert flat.memory.allocated_bytes > plain.memory.allocated_bytes
    for how in ("precision=fp16-master,zero=1", "precision=bf16-master"):
        flat, plain = both(how)
        assert flat.step_time_s == plain.step_time_s
        assert flat.memory.allocated_bytes == plain.memory.allocated_bytes
