"""One of two ranks of gloo on this machine: the averages of DynamicBatch must be equal on both and unbiased; run by a test."""

import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import simtrain as st
from simtrain.run.batch_policy import BatchPolicy, StepPrice

STEPS = 300


def rank_main(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    rows = torch.randn(512, 5) + torch.tensor([0.3, 0.0, -0.2, 0.0, 0.1])
    model = nn.Linear(5, 1, bias=False)  # its gradient of the mean output is the mean row: all is known exactly
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    policy = BatchPolicy((4,), max_accumulation=8, dwell_steps=STEPS // 2)
    dynamic = st.torch.DynamicBatch(ddp, optimizer, 4, accumulation=1, policy=policy, price=StepPrice(1, 0.001, 0.001), every=1, decay=1.0)
    generator = torch.Generator().manual_seed(10 + rank)
    while dynamic.steps < STEPS:
        chosen = torch.randint(512, (4,), generator=generator)
        with dynamic.micro_batch(4):
            dynamic.backward(ddp(rows[chosen]).mean())
        dynamic.step()
    mean = rows.mean(0)
    truth = torch.tensor([float((rows - mean).square().sum(1).mean()), float(mean.square().sum()), float(dynamic.choice.accumulation)])
    seen = torch.tensor([dynamic.average.trace, dynamic.average.gradient_sqr, float(dynamic.choice.accumulation)])
    everywhere = [torch.empty(3), torch.empty(3)]
    dist.all_gather(everywhere, seen)
    if not torch.equal(*everywhere):
        raise SystemExit(f"ranks differ: {everywhere}")
    error = dynamic.average.gradient_sqr_error
    if dynamic.choice.accumulation < 2 or abs(seen[0] / truth[0] - 1) > 0.1 or abs(seen[1] - truth[1]) > 3.5 * error:
        raise SystemExit(f"{seen} instead of {truth}, within {error}")
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2])
