"""Masks of Hugging Face's models as a real step has them, although it is recorded on tensors without values.

Transformers leaves a mask away where it can see that nothing is padded and samples are not packed, and asks the attention to be causal
instead, which is what its fused kernels need. Tensors without values cannot be looked into; then it builds masks that no real step has.
Here what it would look for is answered from the example batch. Read from `transformers.masking_utils` of Transformers 5.23; where a
version lacks these functions, masks are built and the capture says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

_MODULE = "transformers.masking_utils"
_SKIPS = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
_PACKING = "find_packed_sequence_indices"


def holds_no_padding(batch: Any) -> bool:
    """Whether the example batch has no padding mask, or one that masks nothing."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor):
        return True
    with unset_fake_temporarily():
        return bool(mask.all())


@contextmanager
def masks_of_real_steps(batch: Any) -> Iterator[None]:
    """Answers what Transformers would look up in values.

    Args:
        batch: Real tensors. Where it has a padding mask that masks something, masks are built; where it brings positions of its own,
            Transformers looks for several sequences in a row.
    """
    padded, packed = not holds_no_padding(batch), isinstance(batch, Mapping) and "position_ids" in batch
    module = sys.modules.get(_MODULE)
    answers: dict[str, Callable[..., Any]] = {}
    if module is not None and not padded:
        answers = {name: _without_padding(getattr(module, name)) for name in _SKIPS if hasattr(module, name)}
    if hasattr(module, _PACKING) and not packed:
        answers[_PACKING] = lambda *_, **__: None
    before = {name: getattr(module, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(module, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def _without_padding(asks: Callable[..., bool]) -> Callable[..., bool]:
    def answer(padding_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> bool:
        del padding_mask
        return asks(None, *args, **kwargs)

    return answer
