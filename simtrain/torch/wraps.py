"""Ready ways to distribute a module for `record_rank`: DDP, ZeRO-1 and FSDP2, as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from simtrain.torch.distributed import Wrap
from simtrain.torch.fake_group import average_bucket


def replicated(dim: str = "data", **options: Any) -> Wrap:
    """DDP over a dimension of the mesh.

    Args:
        dim: Name of the dimension.
        options: Of `DistributedDataParallel`: `bucket_cap_mb`, `gradient_as_bucket_view`, ...
    """

    def wrap(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group(dim)
        parallel = DistributedDataParallel(module, process_group=group, init_sync=False, **options)
        parallel.register_comm_hook(group, average_bucket)
        return parallel

    return wrap


def sharded_optimizer(make: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Callable[[nn.Module], Any]:
    """ZeRO-1: every rank keeps the optimizer's state of some whole parameters, updates them and broadcasts them.

    Args:
        make: Makes the optimizer of a rank's parameters.
        options: Of that optimizer, or of `ZeroRedundancyOptimizer`.
    """
    return lambda module: ZeroRedundancyOptimizer(module.parameters(), make, **options)


def fully_sharded(blocks: Callable[[nn.Module], Iterable[nn.Module]], dim: str = "data", **options: Any) -> Wrap:
    """FSDP2 over a dimension of the mesh: every block is gathered on its own, and what is in none of them with the root.

    Args:
        blocks: Lists the blocks of a module.
        dim: Name of the dimension.
        options: Of `fully_shard`: `reshard_after_forward`, `mp_policy`, ...
    """

    def wrap(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        own = mesh[dim] if mesh.ndim > 1 else mesh
        for part in (*blocks(module), module):
            fully_shard(part, mesh=own, **options)
        return module

    return wrap
