"""Records what real PyTorch does: storages allocated and alive at every dispatched operator, tensors saved, FLOPs counted."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.workloads.list_replay import Moment

aten = torch.ops.aten


class AllocationRecorder(TorchDispatchMode):
    """Notes every operator that makes a new storage, and the bytes of the storages made so far that are alive.

    Args:
        known: Tensors that exist already.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.moments: list[Moment] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live = {k: (ref, size) for k, (ref, size) in self.live.items() if not ref.expired()}
        fresh = []
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage._cdata not in self.live and storage._cdata not in self.known:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    fresh.append(storage.nbytes())
        if fresh:
            self.moments.append(Moment(str(func), tuple(fresh), sum(size for _, size in self.live.values())))
        return out


def known_tensors(module: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    return [*module.parameters(), *module.buffers(), *batch]


def autocast_to(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def record_allocations(module: nn.Module, batch: tuple[Tensor, ...], autocast: torch.dtype | None = None) -> list[Moment]:
    """Runs one forward and backward pass; gradients are new."""
    module.zero_grad(set_to_none=True)
    with AllocationRecorder(known_tensors(module, batch)) as recorder:
        with autocast_to(autocast):
            loss = module(*batch)
        loss.backward()
    return recorder.moments


def record_saved(module: nn.Module, batch: tuple[Tensor, ...], autocast: torch.dtype | None = None) -> list[int]:
    """Returns the sizes of the storages that autograd keeps, parameters, buffers and the batch left out."""
    known = {t.untyped_storage()._cdata for t in known_tensors(module, batch)}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage.nbytes():
            kept.append(tensor)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast_to(autocast):
        module(*batch)
    return sorted(sizes.values())


def count_flops(module: nn.Module, batch: tuple[Tensor, ...]) -> int:
    """Counts forward and backward, with the counter's own formula for fused attention applied to the CPU's operator."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    def grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
        # rows and columns of one operand are divided among the groups, so that each element of the rows meets one group's columns
        return 2 * a[0] * a[1] * b[-1]

    formulas = {
        aten._grouped_mm: grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        module(*batch).backward()
    return counter.get_total_flops()


@torch.library.custom_op("simtrain_tests::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm as one operator, which PyTorch has on CUDA but composes from small ones on the CPU."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return x * scale * weight, scale


@torch.library.custom_op("simtrain_tests::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    normal = x * scale
    inner = grad * weight
    dx = scale * (inner - normal * (inner * normal).mean(-1, keepdim=True))
    return dx, (grad * normal).sum(dim=(0, 1))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    x, scale, weight = ctx.saved_tensors
    return *rms_norm_backward(grad, x, scale, weight), None


rms_norm.register_autograd(_backward, setup_context=_save)


def fuse_rms_norms(module: nn.Module) -> None:
    """Replaces the forward pass of every RMS norm by the one operator."""
    for part in module.modules():
        if isinstance(part, nn.RMSNorm):
            part.forward = lambda x, part=part: rms_norm(x, part.weight, part.eps)[0]
