"""Checks of what a person writes into a spec: types, choices, names of options, missing ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from simtrain.core.errors import InputError, nearest


def check_types(spec: Any) -> None:
    """Refuses fields of a frozen dataclass that are not of the type (or among the choices) that they are declared with.

    Raises:
        InputError: Says which.
    """
    hints = get_type_hints(type(spec))
    for field in fields(spec):
        _check_type(field.name, getattr(spec, field.name), hints[field.name])


def check_at_least(spec: Any, least: int, names: Iterable[str]) -> None:
    """Refuses numbers below a limit.

    Raises:
        InputError: Says which.
    """
    for name in names:
        if getattr(spec, name) < least:
            limit = "must not be negative" if least == 0 else f"must be at least {least}"
            raise InputError(f"{name} {limit}, not {getattr(spec, name)}")


def merged(cls: type, kind: str, defaults: dict[str, Any], options: dict[str, Any], required: Iterable[str]) -> dict[str, Any]:
    """Returns defaults overridden by options.

    Args:
        cls: The spec, a dataclass.
        kind: What it is called in messages ("a transformer").
        defaults: Of a preset.
        options: Given by a person.
        required: Fields that must be among them.

    Raises:
        InputError: An unknown option (the nearest is suggested), or a missing one.
    """
    known = {f.name for f in fields(cls)}
    for name in options:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(known))}"
            raise InputError(f"{kind} has no option {name!r}: {hint}")
    values = defaults | options
    missing = [n for n in required if n not in values]
    if missing:
        raise InputError(f"{kind} needs {', '.join(missing)}")
    return values


def _check_type(name: str, value: object, hint: Any) -> None:
    if choices := get_args(hint):
        if value not in choices:
            allowed = [str(c) for c in choices]
            near = nearest(str(value), allowed)
            hint_text = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
            raise InputError(f"{name} {value!r} is unknown: {hint_text}")
        return
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{name} must be {'a whole number' if hint is int else f'of type {hint.__name__}'}, not {value!r}")
