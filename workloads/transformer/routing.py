"""How a router spreads choices over experts, and what that means for the fullest of the ranks that share them.

The pace of a layer is that of the rank that gets most. How much that is follows from the shares of the experts (equal, falling as a power
of their rank, or measured), from which experts lie together, and from chance: a step sees so many choices and no more. Its expectation is
the mean over random draws of the largest of the ranks' sums (a normal approximation of the multinomial, seeds fixed).
"""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from simtrain.core.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRAWS = 2048
KINDS = "uniform, zipf:EXPONENT or shares:S-S-..."


@lru_cache(maxsize=256)
def expert_shares(spread: str, experts: int, top_k: int) -> tuple[float, ...]:
    """Share of all choices that each expert gets.

    A token chooses different experts, so that none gets more than one choice in `top_k`; what is cut off goes to the others.

    Args:
        spread: "uniform"; "zipf:EXPONENT", shares that fall as a power of the rank; "shares:S-S-...", one number per expert, as measured.
        experts: How many there are.
        top_k: Experts that a token goes to.

    Raises:
        InputError: Nothing of these, another number of shares than experts, or shares that cannot be.
    """
    raw = _raw_shares(spread, experts)
    if raw is None:
        raise InputError(f"spread={spread!r} is no distribution of choices: give {KINDS}")
    if len(raw) != experts:
        raise InputError(f"spread lists {len(raw)} shares for {experts} experts: give one for each")
    if not (np.all(np.isfinite(raw)) and np.all(raw >= 0) and np.count_nonzero(raw) >= top_k):
        raise InputError(f"spread={spread!r}: shares must be finite and not negative, and at least top_k={top_k} of them above zero")
    return tuple((_capped(raw / raw.sum(), 1 / top_k)).tolist())


def _raw_shares(spread: str, experts: int) -> NDArray[np.float64] | None:
    """Shares as they are stated, or `None` where nothing is."""
    kind, _, value = spread.partition(":")
    with suppress(ValueError):
        if kind == "zipf":
            return np.asarray(np.arange(1.0, experts + 1) ** -float(value))
        if kind == "shares":
            return np.array([float(share) for share in value.split("-")])
    return np.ones(experts) if spread == "uniform" else None


def _capped(shares: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Cuts shares at a limit; the others take over in proportion."""
    cut = np.zeros(len(shares), dtype=bool)
    while np.any(shares[~cut] > most * (1 + 1e-12)):
        cut |= shares > most
        shares = np.where(cut, most, shares)
        shares[~cut] *= (1 - cut.sum() * most) / shares[~cut].sum()
    return shares


@lru_cache(maxsize=256)
def fullest_over_mean(spread: str, experts: int, top_k: int, ranks: int, choices: int) -> float:
    """Expected choices of the fullest rank over the mean.

    Args:
        spread: See `expert_shares`.
        experts: How many there are.
        top_k: Experts that a token goes to.
        ranks: Ranks that share them, equally many each; measured shares in their order, others wherever chance puts them.
        choices: Of one rank's tokens in a micro-batch.
    """
    if ranks == 1:
        return 1.0
    shares = np.array(expert_shares(spread, experts, top_k))
    draws = np.random.default_rng(0)
    placed = np.broadcast_to(shares, (DRAWS, experts))
    if not spread.startswith("shares"):
        placed = draws.permuted(placed, axis=1)
    of_rank = placed.reshape(DRAWS, ranks, -1).sum(axis=2)
    chance = draws.standard_normal(of_rank.shape) * np.sqrt(of_rank * (1 - of_rank) / (choices * ranks))
    return max(float((of_rank + chance).max(axis=1).mean()) * ranks, 1.0)


def dropped_share(spread: str, experts: int, top_k: int, capacity: float) -> float:
    """Share of choices beyond the room of their expert, which is `capacity` times the mean."""
    return float(np.maximum(np.array(expert_shares(spread, experts, top_k)) - capacity / experts, 0.0).sum())
