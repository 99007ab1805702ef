"""What is written for launchers meets the real thing: PyTorch's own parser and two real processes; the declarations of Megatron-LM."""

import argparse
import os
import shlex
import subprocess
import sys

import pytest

from simtrain.core.strategy import Strategy
from simtrain.planner.launchers import emit

# Name, kind and choices as declared in NVIDIA/Megatron-LM at 000c4ac24f, megatron/training/arguments.py (facts, looked up there).
WHOLE, WORD, WORDS, FLAG = "whole", "word", "words", "flag"
MEGATRON = {
    "--tensor-model-parallel-size": (WHOLE, None),
    "--pipeline-model-parallel-size": (WHOLE, None),
    "--pipeline-model-parallel-layout": (WORD, None),
    "--num-virtual-stages-per-pipeline-rank": (WHOLE, None),
    "--context-parallel-size": (WHOLE, None),
    "--cp-comm-type": (WORDS, None),
    "--use-distributed-optimizer": (FLAG, None),
    "--use-megatron-fsdp": (FLAG, None),
    "--data-parallel-sharding-strategy": (WORD, ["no_shard", "optim", "optim_grads", "optim_grads_params"]),
    "--overlap-grad-reduce": (FLAG, None),
    "--overlap-param-gather": (FLAG, None),
    "--micro-batch-size": (WHOLE, None),
    "--global-batch-size": (WHOLE, None),
    "--recompute-granularity": (WORD, ["full", "selective"]),
    "--recompute-method": (WORD, ["uniform", "block"]),
    "--recompute-num-layers": (WHOLE, None),
    "--ckpt-format": (WORD, ["torch", "torch_dist", "torch_dcp", "fsdp_dtensor"]),
    "--expert-model-parallel-size": (WHOLE, None),
    "--sequence-parallel": (FLAG, None),
    "--bf16": (FLAG, None),
    "--fp16": (FLAG, None),
    "--fp8-format": (WORD, ["e4m3", "hybrid"]),
    "--fp8-recipe": (WORD, ["tensorwise", "delayed", "mxfp8", "blockwise", "custom"]),
    "--fp8-param-gather": (FLAG, None),
    "--optimizer": (WORD, ["adam", "sgd", "muon", "dist_muon"]),
}

STRATEGIES = (
    "data=4,micro_batch=2,accumulation=8,precision=bf16-master,checkpoint=full,zero=1,tensor=8,sequence_parallel=true,pipeline=2,"
    "schedule=interleaved,chunks=4",
    "data=8,precision=fp16-master,zero=3,checkpoint=every:4,context=2,context_style=ulysses",
    "data=8,precision=bf16-master,zero=2,checkpoint=selective,expert=4",
    "data=2,zero=1,precision=fp8-params,pipeline=4,cuts=3-4-4-3",
    "data=2,zero=1,precision=mxfp8,pipeline=2,schedule=interleaved",
    "data=2,precision=bf16-master,optimizer=muon",
)


@pytest.mark.parametrize("text", STRATEGIES)
def test_megatron_arguments_are_those_it_declares(text):
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name, (kind, choices) in MEGATRON.items():
        if kind == FLAG:
            parser.add_argument(name, action="store_true")
        else:
            more = {"nargs": "+"} if kind == WORDS else {}
            parser.add_argument(name, type=int if kind == WHOLE else str, choices=choices, **more)
    strategy = Strategy.parse(text)
    args = parser.parse_args(shlex.split(emit("megatron", strategy).text, comments=True))
    assert args.global_batch_size == strategy.global_batch
    if args.use_megatron_fsdp:
        assert args.ckpt_format == "fsdp_dtensor", "validate_args refuses any other format"
    assert not (args.bf16 and args.fp16)
    assert not (args.pipeline_model_parallel_layout and args.num_virtual_stages_per_pipeline_rank), "one of them at most"
    assert not args.fp8_param_gather or args.use_distributed_optimizer or args.use_megatron_fsdp
    assert args.optimizer != "muon" or (args.ckpt_format == "torch" and not args.use_distributed_optimizer)
    assert args.overlap_grad_reduce == (strategy.data * strategy.context > 1), "as it is predicted"


def test_deepspeed_is_told_which_adam():
    for name in ("adam", "adamw"):
        assert f'"adam_w_mode": {str(name == "adamw").lower()}' in emit("deepspeed", Strategy(optimizer=name)).text


@pytest.mark.parametrize("text", ["data=2", "data=4,tensor=8,pipeline=2"])
def test_torchrun_parses_its_command(text):
    run = pytest.importorskip("torch.distributed.run")
    words = shlex.split(emit("torchrun", Strategy.parse(text)).text)
    assert words[0] == "torchrun"
    args = run.get_args_parser().parse_args(words[1:])
    assert int(args.nnodes) * int(args.nproc_per_node) == Strategy.parse(text).ranks
    assert args.training_script == "train.py"


TRAIN = """
import torch, torch.distributed as dist
import sharded

torch.manual_seed(0)
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
calls = 0

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
    def forward(self, x):
        global calls
        calls += 1
        return x + self.down(torch.relu(self.up(x)))

def loss(model, x):
    return model(x).float().square().mean()

alone = torch.nn.Sequential(*(Block() for _ in range(3)))
model = torch.nn.Sequential(*(Block() for _ in range(3)))
model.load_state_dict(alone.state_dict())
model = sharded.shard(model, list(model))
plain, divided = torch.optim.AdamW(alone.parameters(), lr=0.01), sharded.optimizer(model, lr=0.01)
for step in range(2):
    batch = torch.randn(ranks * sharded.ACCUMULATION * sharded.MICRO_BATCH, 16, generator=torch.Generator().manual_seed(step))
    loss(alone, batch).backward()
    calls = 0
    for part in batch.view(ranks, sharded.ACCUMULATION, sharded.MICRO_BATCH, 16)[rank]:
        (loss(model, part) / sharded.ACCUMULATION).backward()
    assert calls == sharded.ACCUMULATION * 3 * (2 if sharded.RECOMPUTE_BLOCKS else 1), calls
    for each in (plain, divided):
        each.step(); each.zero_grad()
own = sum(p.to_local().numel() for p in model.parameters())
every = sum(p.numel() for p in alone.parameters())
assert own * ranks == every, (own, every)
for a, b in zip(alone.parameters(), model.parameters(), strict=True):
    torch.testing.assert_close(a, b.full_tensor(), rtol=1e-4, atol=1e-5)
if rank == 0:
    print("trained", ranks)
dist.destroy_process_group()
"""


def test_two_processes_train_as_one_would(tmp_path):
    pytest.importorskip("torch")
    strategy = Strategy.parse("data=2,micro_batch=2,accumulation=2,zero=3,checkpoint=full")
    (tmp_path / "sharded.py").write_text(emit("fsdp2", strategy).text)
    (tmp_path / "train.py").write_text(TRAIN)
    words = shlex.split(emit("torchrun", strategy).text)
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained 2" in done.stdout
