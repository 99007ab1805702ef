"""The CPU compute model: launch cost, arithmetic and traffic of each class of operator, added up.

The three terms are added because one core overlaps them little, and because a sum is linear in its constants: calibration on the
machine itself fits them by least squares and writes them into the device's `[profile]` as `<class>.launch_s`, `<class>.flops_per_s`
and `<class>.bytes_per_s`. These hold for fp32; constants of another arithmetic path carry its name (`gemm.flops_per_s.bf16`), and
without them the fp32 constants serve, rates of arithmetic scaled by the ratio of the peaks. Without a profile, shares of the data
sheet stand in. Single shapes that the formula misses are corrected by the device's operator table (`hardware_models/operator_table.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from hardware_models.cpu_attention import attention_work
from hardware_models.operator_table import coordinates, correction, label
from simtrain.core.errors import CatalogError, nearest
from simtrain.core.hardware import Device
from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType
from simtrain.core.workload import OperatorKind
from simtrain.cost.onednn import convolves_natively
from simtrain.cost.roofline import ceil_div

CLASSES = (
    "gemm",
    "batched_gemm",
    "attention",
    "attention_backward",
    "elementwise",
    "activation",
    "activation_tanh",
    "complex",
    "cast",
    "norm",
    "norm_backward",
    "softmax",
    "softmax_backward",
    "reduction",
    "embedding",
    "embedding_backward",
    "optimizer",
    "convolution",
    "convolution_backward",
    "batch_norm",
    "batch_norm_backward",
    "pooling",
    "pooling_backward",
)
"""Classes of operators that share constants, in the order calibration lists them."""

ATTENTION = (OperatorKind.ATTENTION, OperatorKind.ATTENTION_BACKWARD)

BF16_BLOCK = 32
"""Contraction length that bf16 instructions of x86 processors work on (a tile row of AMX, a vector of AVX-512 BF16)."""

TERMS = ("launch_s", "flops_per_s", "bytes_per_s")
"""Constants of each class."""

_SHARED = {OperatorKind.COPY: "elementwise"}

TRANSCENDENTAL = frozenset(("gelu", "silu", "swiglu", "sigmoid", "tanh", "softplus", "mish", "elu", "erf", "exp", "log", "sin", "cos"))
"""Words in the names of elementwise operators that compute exponentials and their like."""

COMPLEX = frozenset(("rotate", "complex"))
"""Words in the names of elementwise operators on complex numbers: twice to three times what their bytes cost real ones, on one core."""

# Casts are apart because a step under autocast mixes them with operators on fp32 tensors (norms), which move bytes 1.5 to 2 times as fast.
_STANDS_IN = {"complex": "elementwise", "cast": "elementwise"}
"""Class whose constants serve where a profile was calibrated without operators of a class."""

DATA_SHEET_LAUNCH_S = 5e-6
"""Assumption: an operator call of PyTorch on a CPU without work to do; about 3 us were measured on one server core."""

DATA_SHEET_FLOPS: Mapping[str, float] = {
    "gemm": 0.9,
    "batched_gemm": 0.7,
    "attention": 0.5,
    "attention_backward": 0.4,
    "convolution": 0.7,
    "convolution_backward": 0.6,
}
"""Assumption: share of the peak by class; classes not named do no matrix products, and 0.25 stands for their vector arithmetic."""

DATA_SHEET_BYTES: Mapping[str, float] = {
    "softmax": 0.3,
    "softmax_backward": 0.4,
    "norm": 0.5,
    "norm_backward": 0.4,
    "embedding": 0.4,
    "convolution": 0.4,
    "convolution_backward": 0.4,
    "batch_norm": 0.5,
    "batch_norm_backward": 0.4,
    "pooling": 0.2,
    "pooling_backward": 0.2,
}
"""Assumption: share of the memory bandwidth by class; 0.7 for classes not named.

Exponentials, row sums and copies into other layouts cost more than traffic.
"""

SOURCE = "PyTorch on one pinned server core: launch about 3 us, copies 21 to 35 GB/s; shares of the data sheet by class are assumptions"


def kernel_class(kind: OperatorKind, name: str = "") -> str:
    """Returns the class of operators, one of `CLASSES`, whose constants price a kind.

    Args:
        kind: Of the operator.
        name: Of the operator: elementwise ones with exponentials (GELU, SiLU, ...) take several times as long as their traffic,
            and hyperbolic tangents, also of GELU's approximation, longer still; products of complex numbers (rotary embeddings) do, too.
    """
    words = set(re.split(r"[._#]", name)) if kind is OperatorKind.ELEMENTWISE else set()
    if words & COMPLEX:
        return "complex"
    if words & TRANSCENDENTAL:
        return "activation_tanh" if "tanh" in words else "activation"
    return _SHARED.get(kind, kind.value)


class CpuModel:
    """Prices kernels on CPUs; see the module's description.

    Attributes:
        name: As devices name it in `compute_model`.
    """

    name = "cpu"

    def kernel_times_s(self, device: Device, kernels: KernelBatch) -> FloatArray:
        """Returns the time of each kernel.

        Raises:
            UnsupportedError: The device lacks the arithmetic path.
            CatalogError: The profile names a constant that does not exist.
        """
        _check(device)
        named = [kernel_class(kind, name) for kind, name in zip(kernels.kinds, kernels.names, strict=True)]
        classes = tuple(dict.fromkeys(named))
        index = np.array([classes.index(name) for name in named], dtype=np.intp)
        table = np.array([class_constants(device, name, kernels.arithmetic) for name in classes]).reshape(-1, 3)
        launch_s, flops_per_s, bytes_per_s = table[index].T
        times = calls_done(kernels) * launch_s + flops_done(kernels) / flops_per_s + bytes_done(kernels) / bytes_per_s
        return np.asarray(times * _corrections(device, kernels, named))

    def sources(self, device: Device) -> tuple[str, ...]:
        """Returns what the constants rest on."""
        calibrated = sorted({name.split(".")[0] for name in device.profile})
        own = (f"{device.name}: measured on the machine itself: {', '.join(calibrated)}",) if calibrated else ()
        assumed = [name for name in CLASSES if not {name, _STANDS_IN.get(name)} & set(calibrated)]
        return (*own, SOURCE) if assumed else own


def _corrections(device: Device, kernels: KernelBatch, classes: Sequence[str]) -> FloatArray:
    """What the device's operator table multiplies each kernel's time by; 1 without entries."""
    factors = np.ones(len(kernels))
    for name in dict.fromkeys(classes):
        known = device.operator_table.get(label(name, kernels.arithmetic))
        if known is not None:
            chosen = np.array([other == name for other in classes])
            factors[chosen] = correction(known, coordinates(kernels)[chosen])
    return factors


def flops_done(kernels: KernelBatch) -> FloatArray:
    """Operations that are carried out.

    Attention computes whole blocks of scores. In bf16 it contracts over blocks of 32, so that smaller heads are padded.
    """
    attention = kernels.mask(*ATTENTION)
    flops = kernels.flops.copy()
    flops[attention] *= _attention_work(kernels)[1] / np.maximum(kernels.m * kernels.n, 1.0)[attention]
    if kernels.arithmetic is not DType.BF16:
        return flops
    return np.where(attention, flops * ceil_div(kernels.k, BF16_BLOCK) * BF16_BLOCK / np.maximum(kernels.k, 1.0), flops)


def calls_done(kernels: KernelBatch) -> FloatArray:
    """Pieces of work with a set-up of their own: launches, and for attention every block of scores of every head and sample."""
    calls = kernels.launches.astype(np.float64)
    attention = kernels.mask(*ATTENTION)
    calls[attention] = kernels.batch[attention] * _attention_work(kernels)[0]
    return calls


def bytes_done(kernels: KernelBatch) -> FloatArray:
    """Bytes that a kernel works through: its tensors, for attention its scores, for some convolutions their filter once per sample.

    The flash kernel makes several passes of exponentials and sums over every block of fp32 scores, however small the heads are; their
    bytes stand for that work. Small batches of 1x1 convolutions run as one matrix product per sample.
    """
    moved = kernels.bytes_moved + _filters_again(kernels)
    attention = kernels.mask(*ATTENTION)
    moved[attention] += 4.0 * kernels.batch[attention] * _attention_work(kernels)[1]
    return moved


def _attention_work(kernels: KernelBatch) -> tuple[FloatArray, FloatArray]:
    """Blocks and scores per head of the attentions among kernels."""
    chosen = kernels.mask(*ATTENTION)
    return attention_work(kernels.m[chosen], kernels.n[chosen], kernels.causal[chosen])


def _filters_again(kernels: KernelBatch) -> FloatArray:
    """Bytes of filters that are read for every sample but the first, in each of the products of a convolution or its gradients."""
    if not kernels.windows:
        return np.zeros(len(kernels))
    native = [convolves_natively(w, kernels.samples, e) for w, e in zip(kernels.windows, kernels.element_bytes, strict=True)]
    again = np.array(native) & kernels.mask(OperatorKind.CONVOLUTION, OperatorKind.CONVOLUTION_BACKWARD)
    products = kernels.flops / (2.0 * kernels.batch * kernels.m * kernels.n * kernels.k)
    filters = kernels.batch * kernels.n * kernels.k * kernels.element_bytes
    return np.where(again, products * (kernels.samples - 1) * filters, 0.0)


def class_constants(device: Device, name: str, arithmetic: DType) -> tuple[float, float, float]:
    """Returns launch time, FLOP/s and bytes/s of a class: from the device's profile, else from its data sheet.

    Raises:
        UnsupportedError: The device lacks the arithmetic path.
    """
    peak = device.peak(arithmetic)
    profile = device.profile
    if f"{name}.launch_s" not in profile and f"{name}.launch_s.{arithmetic}" not in profile:
        name = _STANDS_IN.get(name, name)
    flops = profile.get(f"{name}.flops_per_s.{arithmetic}", 0.0)
    if not flops and f"{name}.flops_per_s" in profile:
        flops = profile[f"{name}.flops_per_s"] * peak / device.peak(DType.FP32)
    launch_s = profile.get(f"{name}.launch_s.{arithmetic}", profile.get(f"{name}.launch_s", DATA_SHEET_LAUNCH_S))
    bytes_per_s = profile.get(f"{name}.bytes_per_s.{arithmetic}", profile.get(f"{name}.bytes_per_s", 0.0))
    return (
        launch_s,
        flops or peak * DATA_SHEET_FLOPS.get(name, 0.25),
        bytes_per_s or device.memory.bandwidth_bytes_per_s * DATA_SHEET_BYTES.get(name, 0.7),
    )


def _check(device: Device) -> None:
    known = [f"{name}.{term}" for name in CLASSES for term in TERMS]
    known += ["recompute.launch_s"]
    known += [f"{name}.{term}.{path}" for name in CLASSES for term in TERMS for path in DType]
    for name in device.profile:
        if name not in known:
            near = nearest(name, known)
            raise CatalogError(f"{device.name}: [profile] has no constant {name!r}: did you mean {near[0] if near else known[0]!r}?")
