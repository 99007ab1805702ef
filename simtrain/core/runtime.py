"""What carries a strategy out: the behaviour of the framework that changes time or memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from simtrain.core.errors import InputError, UnknownNameError, nearest
from simtrain.core.runtime_constants import (
    BLACKWELL_ATTENTION,
    BLACKWELL_ATTENTION_SOURCE,
    COMMUNICATION_SHARE_SOURCE,
    COMMUNICATOR_BYTES,
    COMMUNICATOR_SOURCE,
    MIB,
)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A framework's behaviour. Never a hidden bit per measured row: a preset or an explicit `with_`.

    Attributes:
        name: As in `RUNTIMES`.
        launch_s: Host time to issue one kernel in forward or backward (assumption; hosts differ by 2x).
        recompute_s: Host time that recomputation costs for every saved tensor (hooks around saving and restoring it).
        run_ahead_launches: How far the host may be ahead of the device; 0 means the host computes itself (CPU).
        fused_attention: Whether attention is one kernel that does not store the score matrix.
        attention_speed: Speed of the fused attention kernel over FlashAttention-2's (0.5 for FlashAttention 1 and its Triton form).
        blackwell_attention: The same on Blackwell devices with stacked memory, whose tensor cores FlashAttention-2 does not use; 0 for as
            much.
        hopper_products: Speed of matrix products since Hopper over that of today's libraries (below 1 for those of 2023).
        fused_elementwise: Whether chains of elementwise operators run as one kernel each (`simtrain.step.fuse`).
        fused_loss: Whether that holds outside of blocks too (torch.compile of blocks alone leaves the loss as it is).
        fused_norms: Whether an RMS norm is one kernel (PyTorch since 2.8, Triton, compiled), not some ten operators in fp32.
        joined_products: Whether queries, keys and values are one product, and so gate and up (`simtrain.step.join`).
        recompute_stops_early: Whether recomputation ends with the last tensor that backward needs (PyTorch's non-reentrant checkpoints)
            rather than at the end of the segment (the reentrant ones of Megatron-LM and DeepSpeed).
        blocking_launches: Whether the host waits for every kernel (CUDA_LAUNCH_BLOCKING=1), so that its time adds to the device's.
        gather_shards: Whether ranks of ZeRO 1 and 2 hold whole parameters, which each sends to the others in a broadcast of its own
            (InternEvo), rather than slices, which one all-gather collects.
        optimizer_style: "foreach" (multi-tensor with parameter-sized temporaries), "fused" (one pass) or "single" (tensor by tensor).
        flat_gradients: Whether 16-bit gradients with a loss scale are checked, cast, laid end to end, measured and unscaled in passes of
            their own before the update (DeepSpeed's FP16_Optimizer, which stands in without ZeRO).
        first_bucket_bytes: Size of the first gradient bucket.
        bucket_bytes: Size of the others.
        gradient_as_bucket_view: Whether gradients live inside the buckets (else buckets are a second copy).
        overlap_communication: Whether gradients are reduced while backward goes on. Full sharding without it waits for each scatter, and
            sums what sharding groups hold behind all of backward.
        allocator: "caching" (512-byte blocks, reserved segments) or "exact" (what is asked for).
        library: Whose kernels decide what operators take while they run: "stated" by the operators (GPU kernels) or "onednn".
        context_bytes: Device memory outside the allocator (driver context, libraries).
        reserved_factor: Reserved over allocated bytes (0 where the allocator has no such thing).
        workspace_bytes: Persistent library workspaces on the device, as a setting of the framework's fixes them.
        blas_handles: Threads whose products have a workspace of the library's default size (forward, autograd); see `step/workspace.py`.
        hopper_workspace_bytes: The same on devices since Hopper, where libraries take more; 0 for as much.
        loss: How cross-entropy is computed; see `simtrain.core.workload.Form`.
        regather: Whether backward gathers sequence-parallel inputs anew; see `Form`.
        overlap_tensor: Whether tensor-parallel reductions of backward run beside the product of the weight's gradient.
        hidden_share: Share of the multiprocessors that a collective inside a layer takes from the product that hides it.
        split_gathers: Whether what tensor-parallel products read is gathered in pieces, each beside the product of the one before
            (`simtrain.step.overlap`).
        scatter_pieces: Pieces into which tensor-parallel products are cut whose partial sums are scattered, each beside the product of
            the next; 0 scatters behind the whole product.
        scatter_share: Share of the multiprocessors that such products leave to the scatters.
        narrow_scatter: Whether those partial sums travel in the narrow format of a product that has one.
        vocabulary_multiple: Rows that the vocabulary is padded to a multiple of, per tensor-parallel rank.
        expert_weights: Where the weights of experts are multiplied in; see `Form`.
        grouped_experts: Whether the products of all experts are one kernel; see `Form`.
        main_gradients: Whether gradients add up in a persistent fp32 buffer while weights are 16-bit (Megatron-LM).
        wide_reduction: Whether 16-bit gradients are widened to fp32 to be reduced (DeepSpeed's fp32_allreduce); those of a weight that both
            ends of a pipeline hold are not.
        sends_mask: Whether stages hand a mask of all pairs of positions on, whole from every tensor-parallel rank, beside activations of
            which each sends its part; gradients come back whole (DeepSpeed's pipelines of Megatron-LM 1.1).
        divided_send_s: Time that each transfer between stages of several tensor-parallel ranks takes beside the wire: tensors are
            described, divided and gathered, and the host waits for it.
        scatter_gradients: Whether sharded states (ZeRO 1 and up) get gradients by reduce-scatter rather than all-reduce.
        scatter_fp32: Whether full sharding sums gradients over ranks in fp32, whatever their format (`reduce_dtype` of FSDP2).
        copies_shards: Whether full sharding copies parameters out of the buffer in which they arrive, and gradients into the one that
            leaves, between the passes (FSDP2), rather than computing on these buffers (the flat parameters of the first FSDP).
        reduce_every: Whether ZeRO 2 reduces gradients in every micro-batch rather than in the last.
        overlap_gather: Whether gathering updated parameters runs beside the forward pass.
        blocking_sends: Whether a pipeline stage waits until what it sends has left.
        global_norm: Whether no rank updates before all ranks' gradients are there (clipping by their common norm).
        prefetch: Layers whose sharded parameters are gathered ahead (ZeRO 3).
        late_prefetch: Whether backward asks for the next layer's parameters when it has sent a layer's gradients off, behind which they
            then queue (BACKWARD_POST of PyTorch's first FSDP), rather than before the layer's pass.
        communication_share: Share of a device's multiprocessors that a collective occupies while it runs beside computation.
        fused_softmax: Whether unfused attention scales, masks and normalizes scores in one kernel, so that no mask is kept.
        fused_gate: Whether gate and activation of a gated feed-forward part are one kernel; see `Form`.
        score_buffer: Whether unfused attention reserves a buffer of the size of its scores for good.
        copies_attention: Whether fused attention before Hopper keeps its output in a layout that the next product cannot read, beside
            the one that it can, when there are several samples.
        mask_input: Whether the data loader hands a mask of all pairs of positions to the first and the last stage.
        boundary_tensors: Tensors that cross stages and are alive beside those of the pass at work (received ahead, being sent).
        interleaved_boundary_tensors: The same with several chunks per rank.
        communicator_bytes: Device memory of each communicator's buffers, outside the allocator.
        sources: What these constants rest on.
    """

    name: str
    launch_s: float
    run_ahead_launches: int
    fused_attention: bool
    optimizer_style: Literal["foreach", "fused", "single"]
    recompute_s: float = 60e-6
    attention_speed: float = 1.0
    blackwell_attention: float = 0.0
    hopper_products: float = 1.0
    fused_elementwise: bool = False
    fused_loss: bool = True
    joined_products: bool = False
    recompute_stops_early: bool = True
    blocking_launches: bool = False
    gather_shards: bool = False
    flat_gradients: bool = False
    first_bucket_bytes: int = 1 * MIB
    bucket_bytes: int = 25 * MIB
    gradient_as_bucket_view: bool = False
    overlap_communication: bool = True
    allocator: Literal["caching", "exact"] = "caching"
    library: Literal["stated", "onednn"] = "stated"
    fused_norms: bool = True
    context_bytes: int = 0
    reserved_factor: float = 1.0
    workspace_bytes: int = 0
    loss: Literal["torch", "in-place", "fused"] = "torch"
    regather: bool = False
    overlap_tensor: bool = False
    hidden_share: float = 0.0
    split_gathers: bool = False
    scatter_pieces: int = 0
    scatter_share: float = 0.0
    narrow_scatter: bool = False
    vocabulary_multiple: int = 1
    expert_weights: Literal["after", "between", "fused"] = "after"
    grouped_experts: bool = True
    main_gradients: bool = False
    wide_reduction: bool = False
    sends_mask: bool = False
    divided_send_s: float = 0.0
    scatter_gradients: bool = False
    scatter_fp32: bool = False
    copies_shards: bool = False
    reduce_every: bool = False
    overlap_gather: bool = False
    blocking_sends: bool = False
    global_norm: bool = False
    prefetch: int = 1
    late_prefetch: bool = False
    communication_share: float = 0.0
    hopper_workspace_bytes: int = 0
    blas_handles: int = 0
    fused_softmax: bool = False
    fused_gate: bool = False
    score_buffer: bool = False
    copies_attention: bool = False
    mask_input: bool = False
    boundary_tensors: int = 0
    interleaved_boundary_tensors: int = 0
    communicator_bytes: int = 0
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choices = {
            "optimizer_style": ("foreach", "fused", "single"),
            "allocator": ("caching", "exact"),
            "loss": ("torch", "in-place", "fused"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"runtime: {name} must be {' or '.join(allowed)}, not {getattr(self, name)!r}")
        amounts = (
            *("launch_s", "recompute_s", "run_ahead_launches", "context_bytes", "workspace_bytes", "blas_handles"),
            *("blackwell_attention", "scatter_pieces", "divided_send_s"),
        )
        for name in amounts:
            if not getattr(self, name) >= 0:
                raise InputError(f"runtime: {name} must not be negative, not {getattr(self, name)!r}")
        for name in ("communication_share", "hidden_share", "scatter_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"runtime: {name} must be at least 0 and below 1, not {getattr(self, name)!r}")
        for name in ("attention_speed", "hopper_products"):
            if not getattr(self, name) > 0:
                raise InputError(f"runtime: {name} must be above 0, not {getattr(self, name)!r}")
        for name in ("first_bucket_bytes", "bucket_bytes", "reserved_factor"):
            if not getattr(self, name) >= 1:
                raise InputError(f"runtime: {name} must be at least 1, not {getattr(self, name)!r}")

    def with_(self, **changes: object) -> Runtime:
        """Returns a copy with some behaviour changed, such as `with_(fused_attention=False)`.

        Raises:
            InputError: No such behaviour, or a value out of range.
        """
        for name in changes:
            if name not in self.__dataclass_fields__:
                near = nearest(name, self.__dataclass_fields__)
                raise InputError(f"a runtime has no {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        return replace(self, **changes)  # type: ignore[arg-type]


RUNTIMES: dict[str, Runtime] = {
    r.name: r
    for r in (
        Runtime(
            name="torch-eager",
            launch_s=6e-6,
            run_ahead_launches=1000,
            fused_attention=True,
            optimizer_style="foreach",
            communication_share=0.15,
            context_bytes=450 * MIB,
            reserved_factor=1.05,
            blas_handles=2,
            sources=(
                "PyTorch 2.13 documentation: DistributedDataParallel (bucket sizes), optim (foreach default on CUDA), CUDA semantics",
                "recomputation: 60 us of host time per saved tensor, measured on one server core with PyTorch 2.13 on the CPU",
                COMMUNICATION_SHARE_SOURCE,
                "assumption: 6 us of host time per launched kernel in eager PyTorch, 450 MiB of driver context, reserved 1.05 x allocated",
            ),
        ),
        Runtime(
            name="fsdp2",
            launch_s=6e-6,
            run_ahead_launches=1000,
            fused_attention=True,
            optimizer_style="foreach",
            scatter_gradients=True,
            copies_shards=True,
            global_norm=True,
            communication_share=0.15,
            context_bytes=450 * MIB,
            reserved_factor=1.05,
            blas_handles=2,
            sources=(
                "PyTorch 2.13, torch/distributed/fsdp/_fully_shard: one layer prefetched, gradients scattered after every backward pass",
                "copies out of and into the buffers of collectives on the stream that computes: its _fsdp_collectives.py "
                "(foreach_all_gather_copy_out, foreach_reduce)",
                COMMUNICATION_SHARE_SOURCE,
                "assumption: 6 us of host time per launched kernel in eager PyTorch, 450 MiB of driver context, reserved 1.05 x allocated",
            ),
        ),
        Runtime(
            name="megatron",
            launch_s=6e-6,
            run_ahead_launches=1000,
            fused_attention=True,
            optimizer_style="fused",
            fused_elementwise=True,
            recompute_stops_early=False,
            first_bucket_bytes=160_000_000,
            bucket_bytes=160_000_000,
            gradient_as_bucket_view=True,
            loss="in-place",
            regather=True,
            overlap_tensor=True,
            hidden_share=0.15,
            joined_products=True,
            vocabulary_multiple=128,
            blackwell_attention=BLACKWELL_ATTENTION,
            expert_weights="fused",
            main_gradients=True,
            scatter_gradients=True,
            global_norm=True,
            communication_share=0.15,
            context_bytes=450 * MIB,
            reserved_factor=1.05,
            workspace_bytes=68 * MIB,
            hopper_workspace_bytes=96 * MIB,
            fused_softmax=True,
            fused_gate=True,
            copies_attention=True,
            mask_input=True,
            boundary_tensors=2,
            interleaved_boundary_tensors=3,
            communicator_bytes=COMMUNICATOR_BYTES,
            sources=(
                "fused elementwise kernels and reentrant checkpoints: Megatron-LM, core/fusions, core/tensor_parallel/random.py (recalled)",
                "Megatron-LM, core/distributed (fp32 gradient buffer, buckets of 40 million elements), core/tensor_parallel (vocabulary "
                "padded to 128 rows per rank, in-place cross-entropy, gradients reduced beside the weight's product)",
                "one product for queries, keys and values, and one for gate and up: linear_qkv and linear_fc1 (core/transformer)",
                COMMUNICATION_SHARE_SOURCE + "; inside layers too",
                "library workspaces: cuBLAS 2 x 32 MiB as CUBLAS_WORKSPACE_CONFIG=:4096:8 asks for, Transformer Engine 4 MiB, 32 MiB since "
                "Hopper (its get_cublas_workspace_size_bytes)",
                BLACKWELL_ATTENTION_SOURCE,
                "2 boundary tensors, 3 when interleaved, and a second copy of FlashAttention-2's output: integers that fit the peaks of "
                "Megatron-LM's functional tests, from which they were chosen",
                COMMUNICATOR_SOURCE,
                "assumption: 6 us of host time per launched kernel, 450 MiB of driver context, reserved 1.05 x allocated",
            ),
        ),
        Runtime(
            name="deepspeed",
            launch_s=60e-6,
            run_ahead_launches=1000,
            fused_attention=False,
            optimizer_style="fused",
            flat_gradients=True,
            fused_elementwise=True,
            recompute_stops_early=False,
            first_bucket_bytes=500_000_000,
            bucket_bytes=500_000_000,
            gradient_as_bucket_view=True,
            overlap_communication=False,
            loss="in-place",
            vocabulary_multiple=128,
            scatter_gradients=True,
            reduce_every=True,
            blocking_sends=True,
            global_norm=True,
            communication_share=0.15,
            context_bytes=450 * MIB,
            reserved_factor=1.05,
            blas_handles=2,
            communicator_bytes=COMMUNICATOR_BYTES,
            sources=(
                "fused elementwise kernels and reentrant checkpoints: as Megatron-LM (recalled)",
                "Megatron-DeepSpeed with DeepSpeed's ZeRO: buckets of 500 million bytes reduced after backward, unfused attention "
                "(configurations of the BLOOM and vTrain runs)",
                "sends that the stage waits for: DeepSpeed, runtime/pipe/p2p.py at 077e674",
                "passes over fp16 gradients around the update: DeepSpeed, runtime/fp16/fused_optimizer.py at 023f361",
                COMMUNICATION_SHARE_SOURCE,
                COMMUNICATOR_SOURCE,
                "host time: 60 us per launched kernel, about what kernel traces of vTrain's single-node rows show (50 kernels in 3 ms "
                "a layer, under tracing); not told apart from hooks and RNG states of checkpoints",
                "assumption: 450 MiB of driver context, reserved 1.05 x allocated",
            ),
        ),
        Runtime(
            name="xla",
            launch_s=0.0,
            recompute_s=0.0,
            run_ahead_launches=1000,
            fused_attention=True,
            optimizer_style="fused",
            fused_elementwise=True,
            fused_gate=True,
            recompute_stops_early=False,
            overlap_communication=False,
            scatter_gradients=True,
            global_norm=True,
            allocator="exact",
            sources=(
                "one compiled program a step: no launches of the host; elementwise chains are fused",
                "gathers run beside computation, reductions are waited for: options of libtpu in MaxText's scripts for TPU v4, v5e, v5p "
                "(looked up) make all-gathers asynchronous and name no reduce-scatter; sums between slices come behind all layers "
                "(assumption)",
                "clipping by the common norm: MaxText's default (recalled)",
            ),
        ),
        Runtime(
            name="torch-eager-cpu",
            launch_s=0.0,
            run_ahead_launches=0,
            fused_attention=True,
            optimizer_style="single",
            allocator="exact",
            library="onednn",
            fused_norms=False,
            sources=("PyTorch 2.13 on the CPU: the host computes, its cost per operator is part of the calibrated kernel times",),
        ),
    )
}
"""Presets by name."""

RUNTIMES["fsdp2-compiled"] = RUNTIMES["fsdp2"].with_(
    name="fsdp2-compiled",
    fused_elementwise=True,
    fused_loss=False,
    fused_gate=True,
    sources=(
        *RUNTIMES["fsdp2"].sources,
        "blocks compiled by torch.compile: chains of elementwise operators are one kernel each, gate and activation too; the loss is not "
        "compiled (pytorch/torchtitan, torchtitan/parallelisms/parallelize_llama.py, apply_compile)",
    ),
)
RUNTIMES["fsdp2-2024"] = RUNTIMES["fsdp2"].with_(
    name="fsdp2-2024",
    fused_norms=False,
    sources=(
        *RUNTIMES["fsdp2"].sources,
        "RMS norm in eager PyTorch before version 2.8 is composed of elementwise operators in fp32 (pytorch/pytorch pull request 153666)",
    ),
)
RUNTIMES["megatron-2021"] = RUNTIMES["megatron"].with_(
    name="megatron-2021",
    fused_attention=False,
    overlap_tensor=False,
    sources=(
        *RUNTIMES["megatron"].sources,
        "Megatron-LM as of 2021: backward reduces over tensor-parallel ranks after the product of the weight's gradient, not beside it "
        "(its fork bigscience-workshop/Megatron-DeepSpeed, megatron/mpu/layers.py at 119a0d2)",
    ),
)
RUNTIMES["nemo"] = RUNTIMES["megatron"].with_(
    name="nemo",
    overlap_gather=True,
    hidden_share=0.045,
    split_gathers=True,
    scatter_pieces=4,
    scatter_share=0.14,
    workspace_bytes=76 * MIB,
    hopper_workspace_bytes=160 * MIB,
    sources=(
        *RUNTIMES["megatron"].sources,
        "Megatron-LM with tp_comm_overlap, as NeMo's recipes for performance set it: Transformer Engine's userbuffers gather and scatter "
        "in pieces beside products (pytorch/module/base.py: ring exchanges for gathers, 4 splits for scatters behind forward products, 3 "
        "workspaces of products; buffers of the size of each gathered tensor are outside PyTorch's allocator and not counted)",
        "multiprocessors of 132: 6 for collectives beside products (2 to 24), 19 that products behind which sums are scattered leave free "
        "(8 to 24, set_sm_margin): means of the recipes of GPT-3 175B and Llama 3.1 405B in bf16 on H100, NVIDIA/dgxc-benchmarking at "
        "35a9aec and NeMo's tp_overlap_configs/userbuffers.py",
        "updated parameters gathered beside the forward pass: overlap_param_sync of the same recipes",
    ),
)
RUNTIMES["megatron-local"] = RUNTIMES["megatron"].with_(
    name="megatron-local",
    fused_attention=False,
    score_buffer=True,
    workspace_bytes=64 * MIB,
    hopper_workspace_bytes=64 * MIB,
    sources=(
        *RUNTIMES["megatron"].sources,
        "Megatron-LM's own layers instead of Transformer Engine's: no workspace of the latter; core/transformer/dot_product_attention.py "
        "takes a buffer of the scores' size from the global memory buffer",
    ),
)


def runtime(name: str) -> Runtime:
    """Looks a preset up.

    Raises:
        UnknownNameError: With the nearest names.
    """
    try:
        return RUNTIMES[name]
    except KeyError:
        raise UnknownNameError("runtime", name, RUNTIMES) from None
