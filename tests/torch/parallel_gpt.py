"""The transformer family's GPT under tensor parallelism, as Megatron and torchtitan do it, with PyTorch's own plans."""

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from workloads.transformer.module import Transformer


def tensor_parallel(*, sequence: bool, dim: str = "tensor") -> Callable[[nn.Module, DeviceMesh], nn.Module]:
    """Splits heads, the inner width of the MLP and the vocabulary; with `sequence`, norms and residual streams along the sequence."""

    def wrap(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Transformer)
        own = mesh[dim] if mesh.ndim > 1 else mesh
        for block in module.blocks:
            parallelize_module(block, own, block_plan(sequence))
            block.attention.widths = [width // own.size() for width in block.attention.widths]
        parallelize_module(module, own, ends_plan(sequence))
        if module.spec.tied_head:
            module.head.linear.weight = module.embedding.wte.weight  # tied again
        return module

    return wrap


def block_plan(sequence: bool) -> dict[str, object]:
    stream = Shard(1) if sequence else Replicate()
    plan: dict[str, object] = {
        "attention.qkv": ColwiseParallel(),
        "attention.proj": RowwiseParallel(output_layouts=stream),
        "mlp.fc1": ColwiseParallel(),
        "mlp.fc2": RowwiseParallel(output_layouts=stream),
    }
    if sequence:
        plan |= {"norm_1": SequenceParallel(), "norm_2": SequenceParallel()}
        plan |= dict.fromkeys(("attention", "mlp"), PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)))
    return plan


def ends_plan(sequence: bool) -> dict[str, object]:
    """The embedding reduces whole sequences, because learned positions are added before they are split."""
    stream = Shard(1) if sequence else Replicate()
    plan: dict[str, object] = {
        "embedding.wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head.linear": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        plan["embedding"] = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
        plan["head.norm"] = SequenceParallel()
    return plan
