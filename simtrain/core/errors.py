"""The error tree. Everything simtrain raises on purpose descends from `SimtrainError`.

```
SimtrainError
├── InputError                 what a person gave cannot be used            exit code 2
│   ├── UnknownNameError       a name that no catalog holds (nearest matches are suggested)
│   ├── QuantityError          a number without a unit, with the wrong unit, or out of range
│   ├── CatalogError           a data file that does not follow its schema (file, line, field)
│   ├── StrategyError          a way of training that contradicts itself, the model or the machines
│   └── NothingFitsError       a well-formed question whose answer is that nothing fits     exit code 1
├── UnsupportedError           well-formed, but not modelled: never silently ignored   exit code 3
└── InternalError              simtrain contradicts itself: please report              exit code 4
```
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_DROPPED = re.compile(r"[^\w.]|_|(?<!\d)\.|\.(?!\d)")


class SimtrainError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        exit_code: What the command line returns for it.
    """

    exit_code = 1


class InputError(SimtrainError):
    """What a person gave cannot be used."""

    exit_code = 2


class UnknownNameError(InputError):
    """A name that no catalog holds.

    Args:
        kind: What was looked for ("device", "workload", ...).
        name: What was given.
        known: What is allowed.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(set(known))
        near = nearest(name, names)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}: {hint}")
        self.kind = kind
        self.name = name
        self.suggestions = near


class QuantityError(InputError):
    """A number without a unit, with the wrong unit, or out of range."""


class CatalogError(InputError):
    """A data file that does not follow its schema; the message names file, line and field."""


class StrategyError(InputError):
    """A way of training that contradicts itself, the model or the machines."""


class NothingFitsError(InputError):
    """A well-formed question whose answer is that nothing fits: no defect of the input, so that the exit code is another."""

    exit_code = 1


class UnsupportedError(SimtrainError):
    """Well-formed, but not modelled. Raised instead of giving a number that leaves something out."""

    exit_code = 3


class InternalError(SimtrainError):
    """simtrain contradicts itself (a defect, never the user's fault)."""

    exit_code = 4


def nearest(name: str, known: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """Returns up to `count` known names that look like `name`, best first."""
    by_folded = {fold(n): n for n in known}
    folded = fold(name)
    inside = sorted((k for k in by_folded if len(folded) >= 3 and folded in k), key=len)
    beginning = [k for k in inside if k.startswith(folded)]
    close = difflib.get_close_matches(folded, list(by_folded), n=count, cutoff=0.55)
    start = sorted(k for k in by_folded if len(folded) >= 4 and k.startswith(folded[:-1]))  # all but the last character
    ordered = dict.fromkeys(beginning + close + inside + start)
    return tuple(by_folded[k] for k in list(ordered)[:count])


def fold(name: str) -> str:
    """Folds a name for comparison: lower case, letters and digits only (`RTX 3090` and `rtx-3090` are one name).

    A point between two digits stays: 1.3b and 13b are two sizes.
    """
    return _DROPPED.sub("", name.lower())
