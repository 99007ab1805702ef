"""Blocks of PyTorch's flash attention on CPUs: what it computes of a square of scores, and in how many pieces.

Rows of scores are made in blocks of queries against blocks of keys. Causal attention leaves out the blocks of keys above the diagonal, but
computes every block that it begins in full: below 512 keys it saves nothing.
Source: `FlashAttentionKernel.cpp` of PyTorch (`aten/src/ATen/native/cpu`), forward and backward, which split alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simtrain.core.polynomial import FloatArray

KEY_BLOCK = 512
"""Keys of a block."""
QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
"""From how many queries on, blocks of how many queries."""


def query_block(queries: float) -> int:
    """Returns how many queries a block has, in an attention over so many."""
    return next(block for least, block in QUERY_BLOCKS if queries >= least)


def blocks_and_scores(queries: float, keys: float, *, causal: bool) -> tuple[float, float]:
    """Returns how many blocks of scores one head computes, and how many scores these hold.

    Args:
        queries: Rows.
        keys: Columns.
        causal: Whether a query sees only the keys up to its own place.
    """
    block = query_block(queries)
    first = np.arange(0.0, queries, block)
    rows = np.minimum(block, queries - first)
    seen = np.minimum(first + rows, keys) if causal else np.full(len(first), keys)
    begun = np.ceil(seen / KEY_BLOCK)
    return float(begun.sum()), float((rows * np.minimum(begun * KEY_BLOCK, keys)).sum())


def attention_work(queries: FloatArray, keys: FloatArray, causal: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Returns blocks and scores of several attentions, per head; see `blocks_and_scores`."""
    pairs = [blocks_and_scores(q, k, causal=bool(c)) for q, k, c in zip(queries, keys, causal, strict=True)]
    blocks, scores = np.array(pairs).reshape(-1, 2).T
    return blocks, scores
