"""Trains a small GPT on two processes with `simtrain.torch.apply` and says how far gradients are from those of one process."""

import copy
import json
import sys

import torch
import torch.distributed as dist

import simtrain as st
from simtrain.core.tensorize import parse_tensorize
from simtrain.torch.tensor_conversion import tensorize_blocks
from workloads.transformer import module as transformer
from workloads.transformer import presets as transformers


def main() -> None:
    rank, world, store, zero, tensorize = int(sys.argv[1]), 2, sys.argv[2], int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    spec = transformers.spec("gpt", layers=3, hidden=32, heads=2, vocabulary=64, sequence=16, max_positions=16)
    model = transformer.Transformer(spec)
    ids, targets = transformer.example_batch(spec, 8, 16)
    plain = copy.deepcopy(model)
    if form := parse_tensorize(tensorize):
        tensorize_blocks(plain, ["blocks"], form)
    plain(ids, targets).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    applied = st.torch.apply(
        f"data=2,zero={zero},accumulation=2,tensorize={tensorize},checkpoint=layers:[0-1],optimizer=sgd", model, optimizer
    )
    seen = {}

    def look(*_: object) -> None:
        for name, p in model.named_parameters():
            gradient = p.grad.full_tensor() if zero == 3 else p.grad
            seen[name] = float((gradient - expected[name]).abs().max() / expected[name].abs().max())

    optimizer.register_step_pre_hook(look)
    for part in range(2):
        mine = slice(4 * rank + 2 * part, 4 * rank + 2 * part + 2)
        with applied.forward():
            loss = applied.model(ids[mine], targets[mine])
        applied.backward(loss)
    if rank == 0:
        print(json.dumps({"worst": max(seen.values()), "recomputed": applied.recomputed, "kept": applied.kept, "parameters": len(seen)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
