"""Results of sweeps on disk, addressed by what they depend on: the question's content and the code that answered it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simtrain.core.errors import InputError

FORMAT = 1
MARK = "simtrain-sweep.json"
PACKAGES = ("simtrain", "hardware_models", "workloads")


@cache
def fingerprint() -> str:
    """Hash of the code and catalogs that predictions come from, so that results of another version are never taken for this one's."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        found = find_spec(package)
        for root in sorted(found.submodule_search_locations or ()) if found else ():
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in (".py", ".toml", ".csv", ".json") and path.is_file():
                    digest.update(path.relative_to(root).as_posix().encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def default_folder() -> Path:
    """Where results are kept: the user's cache directory."""
    from platformdirs import user_cache_path

    return user_cache_path("simtrain") / "sweeps"


@dataclass(frozen=True, slots=True)
class Cache:
    """Finished points of sweeps.

    Attributes:
        folder: Where.
    """

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Cache:
        """Opens or makes a cache.

        Raises:
            InputError: The folder holds something else, is of another format, or cannot be written.
        """
        mark = folder / MARK
        try:
            if mark.is_file():
                found = json.loads(mark.read_text(encoding="utf-8"))
                if not isinstance(found, dict) or found.get("format") != FORMAT:
                    raise InputError(
                        f"the cache {folder} was written by another version of simtrain (format {found.get('format')!r}, this one "
                        f"reads {FORMAT}): delete it or give another folder"
                    )
            else:
                folder.mkdir(parents=True, exist_ok=True)
                if any(folder.iterdir()):
                    raise InputError(f"{folder} is no cache of sweeps (there is no {MARK} in it): give an empty folder or a cache")
                mark.write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot use the cache {folder}: {error}") from None
        return cls(folder)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key; `None` if nothing was, or nothing whole."""
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found["row"] if isinstance(found, dict) and found.get("key") == key else None

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a row; a crash leaves either all of it or nothing."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
            json.dump({"key": key, "row": row}, part)
        os.replace(part.name, path)  # noqa: PTH105 (the name is text)

    def _path(self, key: str) -> Path:
        return self.folder / fingerprint() / key[:2] / f"{key}.json"


def key_of(*parts: object) -> str:
    """Address of a question: a hash of what its parts say of themselves."""
    return hashlib.sha256("\x1f".join(repr(p) for p in (fingerprint(), *parts)).encode()).hexdigest()
