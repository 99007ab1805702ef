"""The operator table: where kernels of odd shapes are slower or faster than the formula of their class, as measured on the machine itself.

Small and odd shapes fall off cliffs that no smooth formula has: another kernel of the library, a block that is half empty, a filter that
just leaves the cache. A calibration keeps, for each operator it timed, the logarithm of measured over modelled time at the logarithms of
its sizes. A prediction takes the mean over near entries, drawn towards no correction where there are none:
`sum(w ratio) / (sum(w) + SHRINKAGE)` with Gaussian weights `w` of the distance.
"""

from __future__ import annotations

import numpy as np

from simtrain.core.kernels import KernelBatch
from simtrain.core.polynomial import FloatArray
from simtrain.core.precision import DType

BANDWIDTH = 0.3
"""Distance, in logarithms of sizes, at which an entry counts exp(-1/2). Chosen with `SHRINKAGE` by leaving calibration steps out."""
SHRINKAGE = 0.1
"""Weight of no correction, in entries at no distance."""
COLUMNS = 6
"""Numbers of an entry: five coordinates, then the logarithm of measured over modelled time."""


def coordinates(kernels: KernelBatch) -> FloatArray:
    """Returns where kernels lie in the table: logarithms of batch, m, n, k and bytes, shape (kernels, 5)."""
    sizes = np.column_stack([kernels.batch, kernels.m, kernels.n, kernels.k, kernels.bytes_moved])
    return np.asarray(np.log(np.maximum(sizes, 1.0)))


def label(name: str, path: DType) -> str:
    """Names a class of operators on an arithmetic path: "gemm", "gemm.bf16"."""
    return name if path is DType.FP32 else f"{name}.{path}"


def correction(entries: FloatArray, points: FloatArray) -> FloatArray:
    """Returns what the formula's time is multiplied by at each point.

    Args:
        entries: Of one class, shape (entries, 6): coordinates and the logarithm of measured over modelled time.
        points: Shape (points, 5).
    """
    distance = ((points[:, None, :] - entries[None, :, :-1]) ** 2).sum(axis=2)
    weight = np.exp(-distance / (2 * BANDWIDTH**2))
    return np.asarray(np.exp(weight @ entries[:, -1] / (weight.sum(axis=1) + SHRINKAGE)))
