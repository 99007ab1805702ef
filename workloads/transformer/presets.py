"""Reads `presets.toml` and makes a catalog entry of each preset and family."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from simtrain.core.errors import UnknownNameError, fold
from simtrain.core.workload import Workload
from workloads.transformer.operators import workload
from workloads.transformer.spec import TransformerSpec

DESCRIPTIONS = ("aliases", "source", "note")


@dataclass(frozen=True)
class TransformerFactory:
    """A transformer in the catalog.

    Attributes:
        name: In the catalog.
        defaults: Fields of its spec.
        aliases: Other names.
        source: Where the numbers come from.
        note: What is not as published.
    """

    name: str
    defaults: dict[str, Any] = field(hash=False)
    aliases: tuple[str, ...] = ()
    source: str = ""
    note: str = ""

    def spec(self, **options: Any) -> TransformerSpec:
        """Returns the spec, with options overriding its fields.

        Raises:
            InputError: An option is unknown or out of range.
        """
        return TransformerSpec.from_options(self.defaults, options)

    def __call__(self, *, seq_len: int | None = None, **options: Any) -> Workload:
        """Returns the workload.

        Args:
            seq_len: Sequence length; the preset's own by default.
            options: Fields of the spec to override.

        Raises:
            InputError: An option is unknown or out of range.
        """
        spec = self.spec(**options if seq_len is None else options | {"sequence": seq_len})
        changed = ", ".join(f"{n}={v}" for n, v in options.items())
        description = "; ".join(filter(None, (f"changed: {changed}" if changed else "", self.note)))
        return workload(spec, name=self.name, description=description, source=self.source)


@cache
def factories() -> dict[str, TransformerFactory]:
    """Returns the presets and families by name."""
    tables = tomllib.loads(files("workloads.transformer").joinpath("presets.toml").read_text(encoding="utf-8"))
    return {name: _factory(name, table) for name, table in tables.items()}


def spec(name: str, **options: Any) -> TransformerSpec:
    """Returns the spec of a preset, by name or alias.

    Args:
        name: Such as "gpt2-small".
        options: Fields to override.

    Raises:
        UnknownNameError: With the nearest names.
        InputError: An option is unknown or out of range.
    """
    by_name = {fold(n): f for f in factories().values() for n in (f.name, *f.aliases)}
    if fold(name) not in by_name:
        raise UnknownNameError("transformer", name, factories())
    return by_name[fold(name)].spec(**options)


def _factory(name: str, table: dict[str, Any]) -> TransformerFactory:
    defaults = {k: v for k, v in table.items() if k not in DESCRIPTIONS}
    return TransformerFactory(name, defaults, tuple(table.get("aliases", ())), table.get("source", ""), table.get("note", ""))
