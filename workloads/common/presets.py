"""Presets of a model family: a TOML table each, made into an entry of the workload catalog."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any, Generic, Protocol, TypeVar

from simtrain.core.errors import InputError, UnknownNameError, fold
from simtrain.core.workload import Workload

SpecT = TypeVar("SpecT")
SpecT_contra = TypeVar("SpecT_contra", contravariant=True)

DESCRIPTIONS = ("aliases", "source", "note")


class WorkloadOf(Protocol[SpecT_contra]):
    """Writes the closed form of a spec."""

    def __call__(self, spec: SpecT_contra, *, name: str, description: str, source: str) -> Workload:
        """Returns the workload."""
        ...


@dataclass(frozen=True)
class Preset(Generic[SpecT]):
    """A model in the catalog.

    Attributes:
        name: In the catalog.
        family: What it belongs to.
        defaults: Fields of its spec.
        aliases: Other names.
        source: Where the numbers come from.
        note: What is not as published.
    """

    name: str
    family: Family[SpecT] = field(hash=False, repr=False)
    defaults: dict[str, Any] = field(hash=False)
    aliases: tuple[str, ...] = ()
    source: str = ""
    note: str = ""

    def spec(self, **options: Any) -> SpecT:
        """Returns the spec, with options overriding its fields.

        Raises:
            InputError: An option is unknown or out of range.
        """
        return self.family.from_options(self.defaults, options)

    def __call__(self, *, seq_len: int | None = None, **options: Any) -> Workload:
        """Returns the workload.

        Args:
            seq_len: Sequence length; the preset's own by default. Image models have theirs from the size of the image.
            options: Fields of the spec to override.

        Raises:
            InputError: An option is unknown or out of range.
        """
        free = self.family.free_length
        spec = self.spec(**options if seq_len is None or not free else options | {"sequence": seq_len})
        changed = ", ".join(f"{n}={v}" for n, v in options.items())
        description = "; ".join(filter(None, (f"changed: {changed}" if changed else "", self.note)))
        made = self.family.workload(spec, name=self.name, description=description, source=self.source)
        if seq_len is not None and seq_len != made.sequence:
            raise InputError(f"{self.name} has {made.sequence} tokens per {made.sample_unit}, not {seq_len}: give image_size instead")
        return made


@dataclass(frozen=True)
class Family(Generic[SpecT]):
    """Models with one kind of spec.

    Attributes:
        kind: What one of them is called.
        package: Where its `presets.toml` is.
        from_options: Builds a spec from defaults and options that override them.
        workload: Writes the closed form.
        free_length: Whether a person chooses the sequence length.
    """

    kind: str
    package: str
    from_options: Callable[[dict[str, Any], dict[str, Any]], SpecT]
    workload: WorkloadOf[SpecT]
    free_length: bool = False

    @cached_property
    def presets(self) -> dict[str, Preset[SpecT]]:
        """The presets by name."""
        tables = tomllib.loads(files(self.package).joinpath("presets.toml").read_text(encoding="utf-8"))
        return {name: self._preset(name, table) for name, table in tables.items()}

    def spec(self, name: str, **options: Any) -> SpecT:
        """Returns the spec of a preset, by name or alias.

        Args:
            name: As in the catalog.
            options: Fields to override.

        Raises:
            UnknownNameError: With the nearest names.
            InputError: An option is unknown or out of range.
        """
        by_name = {fold(n): p for p in self.presets.values() for n in (p.name, *p.aliases)}
        if fold(name) not in by_name:
            raise UnknownNameError(self.kind, name, self.presets)
        return by_name[fold(name)].spec(**options)

    def _preset(self, name: str, table: dict[str, Any]) -> Preset[SpecT]:
        defaults = {k: v for k, v in table.items() if k not in DESCRIPTIONS}
        return Preset(name, self, defaults, tuple(table.get("aliases", ())), table.get("source", ""), table.get("note", ""))
