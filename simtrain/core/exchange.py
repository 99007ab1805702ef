"""How a strategy says what replicas exchange: gradients made smaller, or parameters every few steps."""

from __future__ import annotations

import math

from simtrain.core.errors import StrategyError, UnknownNameError

COMPRESSIONS = ("none", "16-bit", "8-bit", "1-bit", "powersgd:RANK", "topk:DENSITY", "zero++")
"""What `Strategy.compression` may be."""

LOW_COMMUNICATION = {"local-sgd": "local SGD", "diloco": "DiLoCo"}
"""Methods that synchronise every few steps, with their names in prose."""

MOST_RANK = 32
"""Above it, PowerSGD's thin products would no longer be bound by memory, as they are taken to be."""


def compression_method(text: str) -> tuple[str, float]:
    """Reads a compression: its name, and its rank or density (0 where it has neither).

    Raises:
        StrategyError: A rank or a density is missing, not a number or out of range.
        UnknownNameError: No such method.
    """
    name, colon, value = text.partition(":")
    if name == "powersgd":
        if not value.isdecimal() or not 1 <= int(value) <= MOST_RANK:
            raise StrategyError(f"compression=powersgd:RANK needs a whole rank from 1 to {MOST_RANK}, such as powersgd:4, not {text!r}")
        return name, float(int(value))
    if name == "topk":
        density = _number(value)
        if not 0 < density <= 1:
            raise StrategyError(f"compression=topk:DENSITY needs a density above 0 and at most 1, such as topk:0.01, not {text!r}")
        return name, density
    if colon or name not in COMPRESSIONS:
        raise UnknownNameError("compression", text, COMPRESSIONS)
    return name, 0.0


def low_communication_method(text: str) -> tuple[str, int]:
    """Reads a method that synchronises every few steps: its name, and how many; ("", 1) for the empty text.

    Raises:
        StrategyError: The number of steps is missing or not a whole number of at least 1.
        UnknownNameError: No such method.
    """
    if not text:
        return "", 1
    name, _, value = text.partition(":")
    if name not in LOW_COMMUNICATION:
        raise UnknownNameError("low communication", text, [f"{n}:STEPS" for n in LOW_COMMUNICATION])
    if not value.isdecimal() or int(value) < 1:
        raise StrategyError(f"low_communication={name}:STEPS needs a whole number of steps of at least 1, such as {name}:100, not {text!r}")
    return name, int(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
