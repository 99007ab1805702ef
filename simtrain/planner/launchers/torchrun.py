"""The command that starts the ranks.

Source: PyTorch 2.13, `torch.distributed.run.get_args_parser` (options `--nnodes`, `--nproc-per-node`, `--rdzv-backend`,
`--rdzv-endpoint`, `--standalone`); the tests parse with it what is written, and run it with two processes. It knows ranks only; how they
divide the work is the program's business.
"""

from __future__ import annotations

import re
from dataclasses import fields

from simtrain.core.errors import InputError
from simtrain.core.strategy import Strategy
from simtrain.planner.launchers.form import Job, Written, beyond

NAME = "torchrun"


def write(strategy: Strategy, job: Job) -> Written:
    """Writes the command; the program is `train.py`.

    Raises:
        InputError: The ranks do not fill nodes.
    """
    ranks = strategy.ranks
    on_node = min(job.per_node, ranks)
    if ranks % on_node:
        raise InputError(f"{NAME}: {ranks} ranks do not fill nodes of {job.per_node} devices")
    nodes = ranks // on_node
    meeting = " --rdzv-backend=c10d --rdzv-endpoint=$HEAD_NODE:29500" if nodes > 1 else " --standalone"
    unsaid = beyond(strategy, tuple(f.name for f in fields(Strategy) if f.name not in ("data", "plan")), NAME)
    if ranks != strategy.data:
        unsaid["data"] = f"it starts {ranks} ranks, of which {strategy.data} are replicas"
    return Written(f"torchrun --nnodes={nodes} --nproc-per-node={on_node}{meeting} train.py\n", unsaid)


def read(text: str, ranks: int | None) -> Strategy:
    """Reads the ranks; all of them are replicas as far as the command says.

    Raises:
        InputError: The numbers are missing.
    """
    del ranks
    counts = []
    for option, default in (("nnodes", "1"), ("nproc[-_]per[-_]node", None)):
        found = re.search(rf"--{option}[= ](\S+)", text)
        value = found.group(1) if found else default
        if value is None or not value.isdecimal() or int(value) < 1:
            raise InputError(f"{NAME}: --{option.replace('[-_]', '-')} must be a whole number, not {value!r}")
        counts.append(int(value))
    return Strategy(data=counts[0] * counts[1])
