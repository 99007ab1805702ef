"""A strategy carried out on real modules: gradients are those of the untouched model, and unsafe blocks are kept and named."""

import copy
import dataclasses
import json
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import simtrain as st
from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from workloads.convnet import module as convnet
from workloads.convnet import presets as convnets
from workloads.transformer import module as transformer
from workloads.transformer import presets as transformers
from workloads.vit import module as vit
from workloads.vit import presets as vits


def gpt(dropout=0.0):
    spec = transformers.spec("gpt", layers=5, hidden=32, heads=2, vocabulary=64, sequence=16, max_positions=16, dropout=dropout)
    return transformer.Transformer(spec), transformer.example_batch(spec, 4, 16)


def image_vit():
    spec = vits.spec("vit", layers=4, hidden=32, heads=2, patch=8, image_size=32, classes=10)
    return vit.VisionTransformer(spec), vit.example_batch(spec, 4)


def resnet():
    spec = convnets.spec("resnet18-cifar")
    return convnet.ResNet(spec), convnet.example_batch(spec, 4)


MODELS = {"gpt": gpt, "gpt-dropout": lambda: gpt(0.1), "vit": image_vit, "resnet": resnet}


def trained(model, batch, strategy="", steps=1, **options):
    """Gradients of the last micro-batch before the optimizer, parameters after it, buffers, and what was applied."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = st.Strategy.parse(f"optimizer=sgd,{strategy}")
    applied = st.torch.apply(how, model, optimizer, **options)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    for _ in range(steps * how.accumulation):
        with applied.forward():
            loss = applied.model(*batch)
        applied.backward(loss)
    return seen, {n: t.clone() for n, t in model.state_dict().items()}, applied


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("checkpoint", ["full", "sqrt", "every:2", "layers:0,2-3", "layers:[1-3]"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_the_untouched_model_bit_by_bit(name, checkpoint):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    plain = trained(copy.deepcopy(model), batch, steps=2)
    again = trained(model, batch, f"checkpoint={checkpoint}", steps=2)
    assert same(plain[0], again[0])
    assert same(plain[1], again[1])
    applied = again[2]
    if name == "resnet":
        assert not applied.recomputed
        assert applied.kept
        assert all("batch norms" in reason for reason in applied.kept.values())
    else:
        assert applied.recomputed
        assert not applied.kept


def test_recomputed_blocks_really_save_nothing_and_run_twice():
    model, batch = gpt()
    runs, saved = dict.fromkeys(model.blocks, 0), {}
    for block in model.blocks:
        block.mlp.fc1.register_forward_hook(lambda *_, b=block: runs.__setitem__(b, runs[b] + 1))
    for checkpoint in ("none", "layers:[0-2]"):
        copied = copy.deepcopy(model)
        applied = st.torch.apply(f"optimizer=sgd,checkpoint={checkpoint}", copied, torch.optim.SGD(copied.parameters()))
        recording = st.torch.record_step(copied, lambda m=copied: m(*batch), batch)
        saved[checkpoint] = sum(recording.storage_bytes[s] for s in recording.saved)
    assert applied.recomputed == ("blocks.0", "blocks.1", "blocks.2")
    layer = sum(4 * 16 * 32 * 4 for _ in range(10))  # a block saves well over ten times its input
    assert saved["none"] - saved["layers:[0-2]"] > 3 * layer
    runs.update(dict.fromkeys(runs, 0))
    applied = st.torch.apply("optimizer=sgd,checkpoint=layers:[0-2]", model, torch.optim.SGD(model.parameters()))
    for _ in range(2):  # in the first step, a block is also tested
        runs.update(dict.fromkeys(runs, 0))
        with applied.forward():
            loss = model(*batch)
        applied.backward(loss)
    assert list(runs.values()) == [2, 2, 2, 1, 1]


def test_accumulation_sums_what_one_large_batch_gives():
    torch.manual_seed(0)
    model, batch = gpt()
    whole = trained(copy.deepcopy(model), batch)
    parts = trained(model, batch, "accumulation=3,checkpoint=full")
    for name, gradient in whole[0].items():
        torch.testing.assert_close(parts[0][name], gradient)


def test_autocast_and_recomputation_agree():
    torch.manual_seed(0)
    model, batch = gpt()
    plain = trained(copy.deepcopy(model), batch, "precision=bf16-amp")
    again = trained(model, batch, "precision=bf16-amp,checkpoint=sqrt")
    assert same(plain[0], again[0])


class Unsafe(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(8, 8), how
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.how == "in place":
            x = x.mul_(2)
        if self.how == "random":
            x = x * random.random()
        if self.how == "counts":
            self.seen += 1
        return self.linear(x)


class Chain(nn.Module):
    def __init__(self, *hows):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Unsafe(how) for how in hows)

    def forward(self, x, y):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, y)


@pytest.mark.parametrize(("how", "reason"), [("in place", "input in place"), ("random", "not do the same twice"), ("counts", "buffers")])
def test_blocks_that_must_not_run_twice_are_kept_and_named(how, reason):
    torch.manual_seed(0)
    model, batch = Chain("safe", "safe", how, "safe"), (torch.randn(4, 8), torch.randn(4, 8))
    random.seed(3)
    plain = trained(copy.deepcopy(model), batch)
    random.seed(3)
    with pytest.warns(UserWarning, match=r"blocks\.2 is not recomputed"):
        again = trained(model, batch, "checkpoint=layers:[0-3]")
    applied = again[2]
    assert list(applied.kept) == ["blocks.2"]
    assert reason in applied.kept["blocks.2"]
    assert applied.recomputed == ("blocks.0", "blocks.1", "blocks.3")
    if how != "random":  # the test itself draws random numbers
        assert same(plain[0], again[0])
        assert same(plain[1], again[1])


class Adding(Chain):
    def forward(self, x, y):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) + 1
        return F.mse_loss(x, y)


class AddingInPlace(Chain):
    def forward(self, x, y):
        x = self.first(x)
        for block in self.blocks:
            x = block(x).add_(1)
        return F.mse_loss(x, y)


@pytest.mark.parametrize("kind", [Adding, AddingInPlace])
def test_what_runs_between_blocks_is_noticed(kind):
    model = kind("safe", "safe")
    with pytest.raises(InputError, match=r"between blocks\.0 and blocks\.1 something else runs"):
        trained(model, (torch.randn(4, 8), torch.randn(4, 8)), "checkpoint=layers:[0-1]")
    trained(kind("safe", "safe"), (torch.randn(4, 8), torch.randn(4, 8)), "checkpoint=full")


def test_blocks_by_name():
    model, batch = gpt()
    applied = trained(model, batch, "checkpoint=full", blocks=["blocks.1", "blocks.3.mlp"])[2]
    assert applied.recomputed == ("blocks.1", "blocks.3.mlp")
    with pytest.raises(InputError, match="no module 'block'"):
        trained(model, batch, "checkpoint=full", blocks=["block"])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_selective_makes_scores_again_bit_by_bit(dropout):
    spec = transformers.spec("gpt", layers=4, hidden=32, heads=4, vocabulary=64, sequence=64, max_positions=64, dropout=dropout)
    batch, model = transformer.example_batch(spec, 4), transformer.Transformer(spec, "unfused")
    plain, *_ = trained(copy.deepcopy(model), batch)
    ours, _, applied = trained(copy.deepcopy(model), batch, "checkpoint=selective")
    assert same(plain, ours)
    assert applied.recomputed == tuple(f"blocks.{i}.attention.core_attention" for i in range(4))
    assert not applied.kept


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        ("checkpoint=optimal", StrategyError, "choose_checkpoint"),
        ("checkpoint=layers:7", StrategyError, r"blocks 0 \(blocks.0\) to 4"),
        ("tensor=2", UnsupportedError, "tensor=2 is not carried out"),
        ("zero=2,data=2", UnsupportedError, "zero=3"),
        ("data=2", StrategyError, "there are 1 processes"),
        ("precision=bf16", UnsupportedError, "stores weights in 16 bit"),
        ("precision=fp8", UnsupportedError, "use fp8-current"),
        ("precision=fp8-current", InputError, "call model.to"),
        ("precision=fp8-current,tensorize=low-rank:rank=4", UnsupportedError, "tensorize=none"),
        ("compression=1-bit", UnsupportedError, "compression=1-bit is not carried out"),
        ("low_communication=diloco:8", UnsupportedError, "low_communication=diloco:8 is not carried out"),
        ("offload=optimizer", UnsupportedError, "DeepSpeed's to move"),
        ("checkpoint=selective", UnsupportedError, "keeps no scores"),
        ("tensor=2,sequence_parallel=true", UnsupportedError, "tensor=2 is not carried out"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(strategy, error, message):
    model, batch = gpt()
    with pytest.raises(error, match=message):
        trained(model, batch, strategy)
    with pytest.raises(InputError, match="optimizer=adamw, but the optimizer is SGD"):
        st.torch.apply("data=1", model, torch.optim.SGD(model.parameters()))


EXAMPLES = {
    "micro_batch": None,  # the batches are the loop's
    "optimizer": None,  # compared with the optimizer given
    "schedule": None,  # says nothing of one stage
    "context_style": None,
    "accumulation": 2,
    "precision": "bf16-amp",
    "checkpoint": "full",
    "offload": "activations",
    "tensorize": "low-rank:rank=4",
    "data": 2,
    "zero": 2,
    "shard": 2,
    "tensor": 2,
    "sequence_parallel": True,
    "pipeline": 2,
    "chunks": 2,
    "cuts": "2",
    "context": 2,
    "expert": 2,
    "compression": "16-bit",
    "low_communication": "local-sgd:4",
}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(st.Strategy)])
def test_no_field_of_a_strategy_is_ignored(name):
    """Each is carried out, shown in what `apply` returns, or refused."""
    model, batch = gpt()
    if name == "plan":
        plan = st.Strategy(data=1, micro_batch=2).replicas
        with pytest.raises(UnsupportedError, match="plan="):
            st.torch.apply(st.Strategy(plan=plan, optimizer="sgd"), model, torch.optim.SGD(model.parameters()))
        return
    if EXAMPLES[name] is None:
        return
    carried_out = name in ("accumulation", "precision", "checkpoint", "offload", "tensorize")
    with nullcontext() if carried_out else pytest.raises((UnsupportedError, StrategyError), match=name):
        *_, applied = trained(model, batch, f"{name}={EXAMPLES[name]}")
    if not carried_out:
        return
    assert name in ("accumulation", "precision") or applied.recomputed or applied.tensorized or applied.notes


def test_products_in_fp8_give_gradients_within_their_rounding():
    """E4M3 rounds by up to 1/16 and E5M2 by up to 1/8; whole gradient tensors are compared."""
    spec = transformers.spec("gpt", layers=4, hidden=64, heads=2, vocabulary=64, sequence=32, max_positions=32)
    torch.manual_seed(3)
    model, batch = transformer.Transformer(spec).to(torch.bfloat16), transformer.example_batch(spec, 3, 31)
    exact = trained(copy.deepcopy(model).float(), batch)[0]
    plain = copy.deepcopy(model)
    plain(*batch).backward()
    wide = {n: p.grad for n, p in plain.named_parameters()}
    narrow, _, applied = trained(model, batch, "precision=fp8-current,checkpoint=full")
    assert len(applied.narrow) == 16
    assert "emulated" in applied.notes[0]

    def off(found):
        return {n: float((found[n].float() - exact[n]).norm() / exact[n].norm()) for n in exact}

    assert max(off(narrow).values()) < 0.2
    assert max(off(narrow).values()) > 2 * max(off(wide).values()), "rounding shows"


def test_an_optimal_choice_is_carried_out():
    model, batch = gpt()
    workload = st.workload("gpt", layers=5, hidden=512, heads=8, vocabulary=512, seq_len=512)
    most = st.schedule(workload, "1x a100-sxm-80g", "micro_batch=8").memory.device_bytes
    chosen = st.choose_checkpoint(workload, "1x a100-sxm-80g", f"micro_batch=8,optimizer=sgd,checkpoint=optimal:{0.8 * most}B")
    assert chosen.checkpoint.startswith("layers:")
    assert trained(model, batch, f"checkpoint={chosen.checkpoint}")[2].recomputed


@pytest.mark.parametrize(("zero", "tensorize"), [(0, "none"), (3, "low-rank:rank=4")])
def test_two_processes_make_the_gradients_of_one(zero, tensorize, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.torch.apply_ranks"]
    places = {"cwd": Path(__file__).parents[2], "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(zero), tensorize], **places) for rank in range(2)]
    answers = [rank.communicate(timeout=120) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), answers[0][1][-2000:] + answers[1][1][-2000:]
    told = json.loads(answers[0][0].splitlines()[-1])
    assert told["worst"] < 1e-5
    assert told["recomputed"] == ["blocks.0", "blocks.1"]
    assert not told["kept"]


def test_everything_in_one_call_is_the_plain_loop_of_the_converted_model():
    """Tensorized layers, recomputation, autocast and accumulation together, bit by bit."""
    torch.manual_seed(0)
    model, batch = gpt(0.1)
    form, parts = "tensorize=low-rank:compression=2", ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    converted = copy.deepcopy(model)
    names = st.torch.apply(f"optimizer=sgd,{form}", converted, torch.optim.SGD(converted.parameters())).tensorized
    assert {done.name for done in names} == {f"blocks.{n}.{part}" for n in range(5) for part in parts}
    assert all(0 < done.error < 1 and done.compression >= 2 for done in names)
    plain = trained(converted, batch, "precision=bf16-amp,accumulation=2", steps=2)
    whole = trained(model, batch, f"precision=bf16-amp,accumulation=2,checkpoint=sqrt,offload=activations,{form}", steps=2)
    assert same(plain[0], whole[0])
    assert same(plain[1], whole[1])
    assert whole[2].recomputed
    assert any("on the CPU already" in note for note in whole[2].notes)


def test_an_optimizer_trains_the_factors():
    model, batch = gpt()
    optimizer = torch.optim.AdamW([{"params": model.embedding.parameters(), "lr": 0.0}, {"params": model.blocks.parameters(), "lr": 0.1}])
    applied = st.torch.apply("tensorize=low-rank:rank=4", model, optimizer)
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for part in (model.embedding, model.blocks) for p in part.parameters()}
    before = model.blocks[0].mlp.fc1.v.weight.clone()
    with applied.forward():
        loss = applied.model(*batch)
    assert applied.backward(loss)
    assert not torch.equal(before, model.blocks[0].mlp.fc1.v.weight)
    with pytest.raises(StrategyError, match="apply before the first step"):
        st.torch.apply("tensorize=low-rank:rank=2", model, optimizer)


def test_tied_layers_stay_whole():
    model, _ = gpt()
    assert "head.linear" not in {done.name for done in st.torch.tensorize(model, "low-rank", rank=2)}
    assert model.head.linear.weight is model.embedding.wte.weight
