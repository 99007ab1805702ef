"""Constants of the GPU compute model: value, meaning, unit, source and kind of each, in one place.

They are shared by all devices of a vendor (the defaults are NVIDIA's, `AMD` replaces some of them); what tells devices apart are the
numbers on their data sheets. The `[profile]` table of a device
file may replace any of them by name with what was measured on that machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hardware_models.constants import checked, constant
from simtrain.core.errors import UnsupportedError
from simtrain.core.hardware import Device, ValueKind

NEUSIGHT = "NeuSight artefact (ASPLOS 2025) per-kernel measurements, fitted over 8 NVIDIA GPUs (fp32 without tensor cores)"
NEUSIGHT_BACKWARD = "NeuSight artefact (ASPLOS 2025) per-operator traces of training: median ratio of backward to forward, NVIDIA"
GEMM_SWEEP = (
    "stas00/ml-engineering, compute/accelerator/README.md: best matrix-product shape of A100 (0.87 SXM, 0.81 PCIe) and GH200 (0.84)"
)
FLASH_2 = "fitted to Dao 2023, FlashAttention-2 (arXiv:2307.08691), A100, head sizes 64 and 128 (figures recalled, not looked up)"
PADDED_VOCABULARY = (
    "NVIDIA, Matrix Multiplication Background User's Guide (rows should be multiples of 16 bytes); size set so that padding GPT-2's "
    "vocabulary from 50257 to 50304 speeds an A100 up by a quarter, as nanoGPT's author reported (recalled)"
)
ALIGNED_LINES = (
    "NVIDIA, Matrix Multiplication Background User's Guide (rows should be multiples of 128 bytes on A100, as a reader's notes "
    "on it quote); size: BLOOM of width 14400 on 8 devices against 14336 (validation/published/layouts/bigscience_bloom.toml)"
)
NEUSIGHT_CONVOLUTION = (
    "NeuSight artefact (ASPLOS 2025) convolution measurements (3x3, stride 1, fp32 without tensor cores), fitted over 3 GPUs"
)
DEEPBENCH = "Baidu DeepBench, fp32 convolutions on a V100 (validation/published/convolutions.toml): median ratio to the forward time"
MODELS = (
    "fitted on published BERT and ResNet-50 training of RTX 8000, RTX A6000, RTX 6000 Ada, A100 and H100 (validation/published: "
    "bert_single_gpu, resnet50_workstation_gpu) together with measured shares of the bandwidth (NeuSight) and best matrix products "
    "(stas00/ml-engineering), rounded between two optima; held out and compared in docs/device_models.md"
)
BATCH_NORM = "counted: statistics first, then the result (PyTorch, aten/src/ATen/native/cuda/Normalization.cuh)"
_FIT, _ASSUMED = ValueKind.MEASUREMENT, ValueKind.ASSUMPTION


def _constant(value: float, meaning: str, source: str, kind: ValueKind = _FIT) -> Any:
    return constant(value, meaning, source, kind)


@dataclass(frozen=True, slots=True)
class GpuConstants:
    """All constants of `hardware_models.gpu`; `fields(GpuConstants)` carries meaning, source and kind of each as metadata."""

    # Matrix products.
    gemm_efficiency_simt: float = _constant(0.942, "share of the fp32 vector peak before tile losses", NEUSIGHT)
    gemm_efficiency_wide: float = _constant(
        0.86, "further share on devices of 2020 and later with 128 fp32 lanes per multiprocessor", "NeuSight artefact, H100 rows only"
    )
    gemm_efficiency_16bit: float = _constant(
        0.92, "share of the dense 16-bit tensor-core peak before tile losses; the best shapes then reach about 0.85", GEMM_SWEEP
    )
    gemm_efficiency_tf32: float = _constant(0.80, "share of the dense TF32 peak before tile losses", MODELS)
    gemm_efficiency_fp8: float = _constant(
        0.82, "share of the dense fp8 peak before tile losses", "stas00/ml-engineering: 0.73 on H200, 0.78 on GH200"
    )
    tile_loss: float = _constant(5.4, "elements a of a tile edge t at which efficiency is 1 / (1 + a (1/tm + 1/tn))", NEUSIGHT)
    prologue_steps: float = _constant(5.8, "steps of the contraction that filling the pipeline costs", NEUSIGHT)
    gemm_bandwidth: float = _constant(0.835, "share of the memory bandwidth inside matrix products", NEUSIGHT)
    l2_reuse: float = _constant(1.0, "edge of the square of results that one wave shares in L2, over that of the wave's tiles", NEUSIGHT)
    misaligned_simt: float = _constant(0.05, "slowdown for each of k and n that is no multiple of 16 bytes, SIMT", NEUSIGHT)
    misaligned_tensor: float = _constant(
        1.0,
        "slowdown if m, n or k is no multiple of 16 bytes, on tensor cores that do 2048 operations per clock",
        PADDED_VOCABULARY,
        kind=_ASSUMED,
    )
    misaligned_line: float = _constant(
        0.3,
        "slowdown if m, n or k is a multiple of 16 bytes but not of a 128-byte line, on tensor cores that do 2048 operations per clock",
        ALIGNED_LINES,
        kind=_ASSUMED,
    )
    gemm_floor_exponent: float = _constant(1.17, "exponent of the power mean of kernel time and launch floor", NEUSIGHT)

    # Sustained power.
    cap_tflops_per_w: float = _constant(0.0971, "fp32 SIMT TFLOP/s per usable watt of a device of 2018", NEUSIGHT)
    cap_doubling_years: float = _constant(4.65, "years in which that doubles", NEUSIGHT)
    cap_offset_w: float = _constant(20.0, "watts that do no arithmetic", NEUSIGHT)
    cap_exponent: float = _constant(8.0, "sharpness of the join of peak and power cap", NEUSIGHT)
    cap_tensor_ratio: float = _constant(
        10.0,
        "cap of 16-bit tensor cores over that of fp32 SIMT",
        "A100 PCIe against SXM; best 16- and 8-bit products of 17 devices are then within 7 % (simtrain validate kernels)",
        kind=_ASSUMED,
    )

    # Kernels bound by memory.
    bandwidth_hbm: float = _constant(0.97, "share of the bandwidth that transfers reach on HBM, instructions apart", MODELS)
    bandwidth_gddr: float = _constant(0.86, "the same on GDDR without error correction", MODELS)
    bandwidth_gddr_ecc: float = _constant(
        0.82, "the same on GDDR with inline error correction", "NeuSight artefact: large elementwise kernels on P4, T4 and L4"
    )
    elements_per_clock: float = _constant(13.0, "elements read or written per clock and multiprocessor by kernels bound by memory", MODELS)
    launch_s: float = _constant(4e-6, "device time of an empty kernel inside a model", "NeuSight artefact, sums over models", kind=_ASSUMED)
    softmax_rows: float = _constant(5.4, "rows of a softmax in flight per multiprocessor", NEUSIGHT)
    softmax_per_clock: float = _constant(3.2, "elements of a softmax per clock and multiprocessor", NEUSIGHT)
    softmax_one_pass: float = _constant(1024.0, "longest row of a softmax that stays in registers", NEUSIGHT)
    norm_rows: float = _constant(12.0, "rows of a layer norm in flight per multiprocessor", NEUSIGHT)
    norm_per_clock: float = _constant(6.5, "elements of a layer norm per clock and multiprocessor", NEUSIGHT)
    softmax_backward: float = _constant(2.7, "backward time over forward time of a softmax", NEUSIGHT_BACKWARD)
    norm_backward: float = _constant(1.95, "backward time over forward time of a layer norm", NEUSIGHT_BACKWARD)
    gather: float = _constant(
        0.6,
        "bandwidth of gathers and scatters of embedding rows over that of elementwise kernels",
        "NeuSight artefact: 1.3 to 3x slower",
        kind=_ASSUMED,
    )

    batch_norm_passes: float = _constant(
        1.5, "traffic of a batch norm over that of reading and writing once: 3 passes", BATCH_NORM, _ASSUMED
    )
    batch_norm_backward_passes: float = _constant(
        5.0 / 3.0, "traffic of its backward pass over that of reading two tensors and writing one: 5 passes", BATCH_NORM, _ASSUMED
    )

    # Convolutions without tensor cores.
    convolution_efficiency_simt: float = _constant(
        0.85, "share of the fp32 vector peak before tile losses, direct or by Winograd's algorithm", NEUSIGHT_CONVOLUTION
    )
    convolution_direct_traffic: float = _constant(1.1, "traffic of direct convolutions over all tensors once", NEUSIGHT_CONVOLUTION)
    winograd_activations: float = _constant(2.9, "traffic of Winograd's transforms over all images once", NEUSIGHT_CONVOLUTION)
    winograd_filters: float = _constant(15.0, "traffic of Winograd's transforms over all filters once", NEUSIGHT_CONVOLUTION)
    convolution_to_filter: float = _constant(0.96, "time of the filter's gradient over forward time, filters of several pixels", DEEPBENCH)
    convolution_to_filter_point: float = _constant(1.52, "the same, filters of one pixel", DEEPBENCH)
    convolution_to_input: float = _constant(0.99, "time of the input's gradient over forward time, for the same taps", DEEPBENCH)
    convolution_to_input_strided: float = _constant(1.79, "the same, filters of one pixel at larger strides", DEEPBENCH)

    convolution_converted_tf32: float = _constant(
        0.5,
        "conversions around TF32 convolutions over those of 16-bit ones, where channels come first",
        "cuDNN has TF32 kernels that read or write channels-first images themselves (names of its kernels, recalled)",
        kind=_ASSUMED,
    )

    # Fused attention: 1 / share = base + softmax / head size, shares of what warp-level tensor instructions reach.
    attention_base: float = _constant(1.165, "forward: time over peak with endless head size", FLASH_2, kind=_ASSUMED)
    attention_softmax: float = _constant(
        28.7, "forward: extra time of the softmax, in head sizes, at 2048 operations per clock", FLASH_2, _ASSUMED
    )
    attention_backward_base: float = _constant(1.339, "backward: time over peak with endless head size", FLASH_2, kind=_ASSUMED)
    attention_backward_softmax: float = _constant(31.7, "backward: extra time of the softmax, in head sizes", FLASH_2, kind=_ASSUMED)
    attention_half_length: float = _constant(165.0, "sequence length at which full attention is at half speed", FLASH_2, kind=_ASSUMED)
    attention_half_length_causal: float = _constant(
        480.0, "sequence length at which causal attention is at half speed", FLASH_2, kind=_ASSUMED
    )
    attention_causal: float = _constant(
        0.96, "speed of long causal attention over full attention, per operation done", FLASH_2, kind=_ASSUMED
    )
    attention_unflashed: float = _constant(
        0.5,
        "speed of PyTorch's memory-efficient kernel over that of FlashAttention-2",
        "about what FlashAttention-2's figures show",
        kind=_ASSUMED,
    )
    warp_tensor_ops: float = _constant(
        2048.0,
        "16-bit operations per clock and multiprocessor that warp-level tensor instructions reach (FlashAttention-2 uses no others)",
        "A100's rate; explains the 335 TFLOP/s that FlashAttention-2 states for H100",
        kind=_ASSUMED,
    )


NEUSIGHT_AMD = "NeuSight artefact (ASPLOS 2025) per-kernel measurements of one GPU, MI100 (fp32 on matrix cores)"
BEST_SHAPES_AMD = (
    "stas00/ml-engineering, compute/accelerator/README.md: best bf16 matrix products of MI250X (one die), MI300X, MI325X and MI355X, "
    "0.77, 0.51 to 0.60, 0.60 and 0.62 of the peak; median, tile losses taken out"
)

AMD: Mapping[str, tuple[float, str, ValueKind]] = {
    "gemm_efficiency_simt": (0.763, NEUSIGHT_AMD, _FIT),
    "gemm_efficiency_wide": (1.0, "no such rule for AMD", _ASSUMED),
    "gemm_efficiency_16bit": (0.67, BEST_SHAPES_AMD, _FIT),
    "gemm_efficiency_tf32": (0.67, "taken equal to the 16-bit share", _ASSUMED),
    "gemm_efficiency_fp8": (0.6, "below the 16-bit share, as on NVIDIA devices", _ASSUMED),
    "tile_loss": (7.5, NEUSIGHT_AMD, _FIT),
    "prologue_steps": (46.0, NEUSIGHT_AMD, _FIT),
    "gemm_bandwidth": (0.738, NEUSIGHT_AMD, _FIT),
    "l2_reuse": (1.11, NEUSIGHT_AMD, _FIT),
    "misaligned_simt": (0.034, NEUSIGHT_AMD, _FIT),
    "gemm_floor_exponent": (1.04, NEUSIGHT_AMD, _FIT),
    "cap_tflops_per_w": (
        10.0,
        "no effect of power was found (0.67 of the peak is kept at any size): the cap is set out of reach",
        _ASSUMED,
    ),
    "bandwidth_hbm": (0.797, NEUSIGHT_AMD, _FIT),
    "elements_per_clock": (1000.0, "not told apart from the bandwidth: set out of reach", _ASSUMED),
    "softmax_rows": (34.0, NEUSIGHT_AMD, _FIT),
    "softmax_per_clock": (4.3, NEUSIGHT_AMD, _FIT),
    "norm_rows": (5.1, NEUSIGHT_AMD, _FIT),
    "norm_per_clock": (3.5, NEUSIGHT_AMD, _FIT),
    "norm_backward": (
        2.7,
        "NeuSight artefact (ASPLOS 2025) per-operator traces of training: median ratio of backward to forward, AMD",
        _FIT,
    ),
}
"""Constants in which AMD devices differ: value, source and kind. The others are NVIDIA's, for want of measurements."""


def constants_of(device: Device) -> GpuConstants:
    """Returns the constants for a device: those of its vendor, its profile applied.

    Raises:
        UnsupportedError: The device is from another vendor and brings no constants of its own.
        CatalogError: The profile names a constant that does not exist.
    """
    vendor = device.vendor.lower()
    if vendor not in ("nvidia", "amd") and not device.profile:
        raise UnsupportedError(
            f"{device.name}: the GPU constants hold for NVIDIA and AMD devices; give those of {device.vendor} in [profile]"
        )
    checked(device, tuple(f.name for f in fields(GpuConstants)))
    own = {name: value for name, (value, *_) in AMD.items()} if vendor == "amd" else {}
    return replace(GpuConstants(), **own | dict(device.profile))


def origins(device: Device) -> dict[str, tuple[str, ValueKind]]:
    """Returns source and kind of each constant that holds for a device, its own profile left out."""
    found = {f.name: (str(f.metadata["source"]), ValueKind(f.metadata["kind"])) for f in fields(GpuConstants)}
    if device.vendor.lower() == "amd":
        found |= {name: (source, kind) for name, (_, source, kind) in AMD.items()}
    return found
