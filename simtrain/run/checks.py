"""Checks of what a person gives, shared by the nouns of a run: each names the field, what was given and what is allowed."""

from __future__ import annotations

import math

from simtrain.core.errors import QuantityError


def above_zero(noun: object, *names: str) -> None:
    """Refuses fields that are not finite numbers above zero (`None` is left alone).

    Raises:
        QuantityError: Naming the field and its value.
    """
    for name, value in _given(noun, names):
        if not (math.isfinite(value) and value > 0):
            raise QuantityError(f"{type(noun).__name__}: {name} must be a number above zero, not {value!r}")


def not_negative(noun: object, *names: str) -> None:
    """Refuses fields that are negative or not finite (`None` is left alone).

    Raises:
        QuantityError: Naming the field and its value.
    """
    for name, value in _given(noun, names):
        if not (math.isfinite(value) and value >= 0):
            raise QuantityError(f"{type(noun).__name__}: {name} must be zero or more, not {value!r}")


def share(noun: object, *names: str) -> None:
    """Refuses fields that are not between 0 and 1 (`None` is left alone).

    Raises:
        QuantityError: Naming the field and its value.
    """
    for name, value in _given(noun, names):
        if not 0 <= value <= 1:
            raise QuantityError(f"{type(noun).__name__}: {name} is a share between 0 and 1, not {value!r}")


def _given(noun: object, names: tuple[str, ...]) -> list[tuple[str, float]]:
    pairs = [(name, getattr(noun, name)) for name in names]
    for name, value in pairs:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise QuantityError(f"{type(noun).__name__}: {name} must be a number, not {value!r}")
    return [(name, float(value)) for name, value in pairs if value is not None]
