"""Results as flat rows, ready for pandas, polars or a CSV file."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from simtrain.core.errors import InputError
from simtrain.core.result import Result


def to_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Returns one flat row per result: the result's own field names, nested ones joined with a dot (`memory.allocated_bytes`).

    Lists (assumptions, sources) become text, joined with "; ".
    """
    return [dict(_flat("", result.to_dict())) for result in results]


def to_frame(results: Iterable[Result]) -> Any:
    """Returns the rows of `to_rows` as a pandas DataFrame, one row per result.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise InputError("to_frame needs pandas, which is not installed: pip install pandas, or use to_rows") from None
    return pandas.DataFrame(to_rows(results))


def _flat(prefix: str, data: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, "; ".join(map(str, value)) if isinstance(value, list) else value
