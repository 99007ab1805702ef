"""Captures what a function in a Python file returns: `FILE.py:FUNCTION`, on the command line and wherever a workload has a name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from simtrain.core.errors import InputError, SimtrainError, nearest
from simtrain.core.workload import Workload
from simtrain.torch.captured import capture, described
from simtrain.torch.recorder import describe

FIELDS = ("model", "batch", "loss", "sequence_dim", "values", "name")
"""What a function may return in a dict."""


def capture_file(text: str, *, seq_len: int | None = None) -> Workload:
    """Captures the model that a function in a file returns.

    Args:
        text: `FILE.py:FUNCTION`. The function takes nothing and returns `(model, batch)`, or a dict with these and, if needed, the
            other arguments of `capture`: `loss`, `sequence_dim`, `values`, `name`.
        seq_len: Sequence length; that of the batch by default.

    Raises:
        InputError: No such file or function (the nearest is suggested), or the function fails or returns something else.
        UnsupportedError: See `capture`.
    """
    given = example(text)
    batch, model = given.pop("batch"), given.pop("model")
    given.setdefault("name", Path(text.rpartition(":")[0]).stem)
    workload = capture(model, batch, **given)
    if seq_len is not None and workload.sample_unit != "sequence":
        raise InputError(f"{text}: the batch has no sequence dimension, so there is no sequence length to set")
    return described(workload, f"captured from {text}", seq_len)


def example(text: str) -> dict[str, Any]:
    """Returns what a function in a file returns: the arguments of `capture`, `model` and `batch` (the example batch) among them.

    Args:
        text: `FILE.py:FUNCTION`, see `capture_file`.

    Raises:
        InputError: See `capture_file`.
    """
    path, colon, name = text.rpartition(":")
    if not colon or not path or not name:
        raise InputError(f"{text!r} is not of the form FILE.py:FUNCTION")
    return _given(_function(Path(path), name), text)


def _function(path: Path, name: str) -> Callable[[], Any]:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = nearest(path.name, [p.name for p in folder.glob("*.py")])
        raise InputError(f"there is no file {path}{_hint(near)}")
    module = _load(path)
    function = getattr(module, name, None)
    if not callable(function):
        defined = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        raise InputError(f"{path} has no function {name!r}{_hint(nearest(name, defined) or tuple(defined[:5]))}")
    found: Callable[[], Any] = function
    return found


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"simtrain_captured_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    sys.modules[spec.name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def _given(function: Callable[[], Any], text: str) -> dict[str, Any]:
    try:
        returned = function()
    except SimtrainError:
        raise
    except Exception as error:
        raise InputError(f"{text} failed: {type(error).__name__}: {error}") from error
    if isinstance(returned, Mapping):
        unknown = [k for k in returned if k not in FIELDS]
        if unknown or "model" not in returned or "batch" not in returned:
            what = f"an unknown key {unknown[0]!r}" if unknown else "no model and batch"
            raise InputError(f"{text} returned a dict with {what}: expected model, batch and, if needed, {', '.join(FIELDS[2:])}")
        return dict(returned)
    if isinstance(returned, tuple) and len(returned) == 2:
        return {"model": returned[0], "batch": returned[1]}
    raise InputError(f"{text} returned {describe(returned)}: expected (model, batch) or a dict with these keys")


def _hint(near: tuple[str, ...]) -> str:
    return f": did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
