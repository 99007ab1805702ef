"""What the compute models share: constants that carry meaning, source and kind, and the checks of a device's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from simtrain.core.errors import CatalogError, nearest
from simtrain.core.hardware import Device, ValueKind


def constant(value: float, meaning: str, source: str, kind: ValueKind = ValueKind.ASSUMPTION) -> Any:
    """Returns the dataclass field of a constant, with meaning, source and kind as its metadata."""
    return field(default=value, metadata={"meaning": meaning, "source": source, "kind": kind})


def checked(device: Device, known: Sequence[str]) -> None:
    """Refuses a `[profile]` that names a constant which does not exist.

    Raises:
        CatalogError: With the nearest names.
    """
    for name in device.profile:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(known)}"
            raise CatalogError(f"{device.name}: [profile] has no constant {name!r}: {hint}")


def required_architecture(device: Device, names: Sequence[str]) -> None:
    """Refuses a device whose `[architecture]` lacks a number that its compute model needs.

    Raises:
        CatalogError: With the line to add.
    """
    for name in names:
        if not device.architecture.get(name, 0.0) > 0:
            raise CatalogError(
                f"{device.name}: the compute model {device.compute_model!r} needs {name} in [architecture] of the device's file: "
                f'add {name} = ["...", "specification", "source key"]'
            )


def sources_of(device: Device, constants: type) -> tuple[str, ...]:
    """Returns the sources of a class of constants, after what the device's own profile replaces."""
    used = dict.fromkeys(f"{f.metadata['source']} [{f.metadata['kind']}]" for f in fields(constants))
    own = (f"{device.name}: measured {', '.join(sorted(device.profile))}",) if device.profile else ()
    return own + tuple(used)
