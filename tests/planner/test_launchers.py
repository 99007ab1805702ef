"""What is written for a launcher reads back as the same strategy, but for what it is said not to say."""

import ast
import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as some

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.core.strategy import Strategy
from simtrain.planner.launchers import LAUNCHERS, emit, read

POWERS = some.sampled_from([1, 2, 4, 8])

STRATEGIES = some.builds(
    Strategy,
    data=POWERS,
    micro_batch=POWERS,
    accumulation=POWERS,
    tensor=POWERS,
    pipeline=POWERS,
    context=some.sampled_from([1, 2]),
    expert=some.sampled_from([1, 2]),
    zero=some.sampled_from([0, 1, 2, 3]),
    shard=some.sampled_from([0, 1, 2, 4]),
    chunks=some.sampled_from([0, 2]),
    sequence_parallel=some.booleans(),
    schedule=some.sampled_from(["1f1b", "interleaved", "gpipe", "zb-h1"]),
    checkpoint=some.sampled_from(["none", "full", "selective", "selective-op", "sqrt", "every:1", "every:4"]),
    precision=some.sampled_from(
        ["fp32", "tf32", "bf16-amp", "fp16-amp", "bf16-master", "fp16-master", "bf16", "fp8", "fp8-params", "fp8-current", "mxfp8"]
    ),
    optimizer=some.sampled_from(["adamw", "adam", "sgd", "sgd-momentum"]),
    context_style=some.sampled_from(["ring", "ulysses", "ring-contiguous"]),
)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@given(strategy=STRATEGIES)
def test_round_trip_but_for_what_is_named(launcher, strategy):
    written = emit(launcher, strategy)
    back = read(launcher, written.text, ranks=strategy.ranks)
    changed = {f.name for f in fields(Strategy) if getattr(back, f.name) != getattr(strategy, f.name)}
    assert changed <= set(written.unsaid), (written.text, str(strategy), str(back))


@pytest.mark.parametrize("precision", ["fp8", "fp8-params", "fp8-current", "mxfp8"])
def test_megatron_is_told_of_fp8(precision):
    written = emit("megatron", Strategy(precision=precision))
    assert "precision" not in written.unsaid
    assert read("megatron", written.text, ranks=1).precision == precision


EXPRESSIBLE = {
    "megatron": "data=4,micro_batch=2,accumulation=8,precision=bf16-master,checkpoint=full,zero=1,tensor=8,sequence_parallel=true,"
    "pipeline=2,schedule=interleaved,chunks=4",
    "torchtitan": "data=8,micro_batch=2,accumulation=4,precision=bf16-amp,checkpoint=full,zero=3,shard=4,tensor=2,sequence_parallel=true",
    "deepspeed": "data=8,micro_batch=2,accumulation=4,precision=bf16-master,zero=2",
    "fsdp2": "data=16,micro_batch=2,accumulation=4,precision=bf16-amp,checkpoint=full,zero=3,shard=8",
    "torchrun": "data=16",
}


@pytest.mark.parametrize(("launcher", "text"), EXPRESSIBLE.items())
def test_what_a_launcher_is_made_for_is_said_in_full(launcher, text):
    strategy = Strategy.parse(text)
    written = emit(launcher, strategy)
    assert not written.unsaid
    assert read(launcher, written.text) == strategy


def test_megatron_arguments_are_its_own():
    text = emit("megatron", Strategy.parse(EXPRESSIBLE["megatron"])).text
    for argument in ("--tensor-model-parallel-size 8", "--global-batch-size 64", "--use-distributed-optimizer", "--bf16"):
        assert argument in text.splitlines()
    assert "--recompute-num-layers 1" in text


def test_the_module_for_fsdp2_is_python():
    tree = ast.parse(emit("fsdp2", Strategy.parse(EXPRESSIBLE["fsdp2"])).text)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "fully_shard" in called


def test_what_others_write_can_be_read():
    words = "torchrun pretrain_gpt.py --tensor-model-parallel-size 4 \\\n "
    words += "--micro-batch-size 1 --global-batch-size 64 --bf16 --sequence-parallel"
    assert read("megatron", words, ranks=32) == Strategy.parse(
        "data=8,accumulation=8,tensor=4,sequence_parallel=true,precision=bf16-master"
    )


@pytest.mark.parametrize(
    ("launcher", "text", "message"),
    [
        ("megatron", "--tensor-model-parallel-size 4", "say how many"),
        ("megatron", "nothing", "no arguments"),
        ("megatron", "# 6 ranks\n--tensor-model-parallel-size 4", "do not divide into replicas of 4"),
        ("torchtitan", "[", "not valid TOML"),
        ("deepspeed", "{", "not valid JSON"),
        ("deepspeed", json.dumps({"train_batch_size": 8}), "must be stated"),
        (
            "deepspeed",
            '{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}',
            "whole number",
        ),
        ("fsdp2", "MESH = 3", "must be stated"),
        ("fsdp2", "(", "cannot be read"),
        ("torchrun", "torchrun train.py", "nproc-per-node"),
    ],
)
def test_bad_files_are_one_clear_error(launcher, text, message):
    with pytest.raises(InputError, match=message):
        read(launcher, text)


def test_unknown_launchers_are_refused():
    with pytest.raises(UnknownNameError, match="megatron"):
        emit("megatronn", Strategy())


@pytest.mark.parametrize("offload", ["none", "optimizer+gradients", "optimizer:nvme+gradients+parameters:nvme"])
def test_deepspeed_says_what_moves(offload):
    strategy = Strategy(data=8, zero=3, precision="bf16-master", offload=offload)
    written = emit("deepspeed", strategy)
    assert not written.unsaid
    assert read("deepspeed", written.text) == strategy


def test_what_moves_is_named_where_a_launcher_cannot_say_it():
    strategy = Strategy(data=8, precision="bf16-master", offload="optimizer+activations")
    for name in LAUNCHERS:
        assert "offload" in emit(name, strategy).unsaid
