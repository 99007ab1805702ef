"""Which convolutions PyTorch hands to oneDNN on a CPU, and which it computes itself."""

from __future__ import annotations

from simtrain.core.workload import Window

NATIVE_SAMPLES = 16
"""Below so many samples PyTorch itself computes fp32 convolutions of one pixel and stride 1 on one thread."""


def convolves_natively(window: Window, samples: int, element_bytes: float) -> bool:
    """Returns whether a convolution runs as one matrix product per sample: without copies, but reading its filter for each of them.

    Source: `use_mkldnn` in PyTorch 2.13, `aten/src/ATen/native/Convolution.cpp`; one thread is assumed.

    Args:
        window: Of the filter.
        samples: Of the micro-batch.
        element_bytes: Of an operand.
    """
    return element_bytes == 4 and samples < NATIVE_SAMPLES and (window.edge, window.stride) == (1, 1)
