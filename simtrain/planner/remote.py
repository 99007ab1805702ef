"""Workers on other machines: a Dask cluster as an executor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from simtrain.core.errors import InputError
from simtrain.planner.cache import fingerprint

ANSWER_S = 10
"""How long a scheduler may take to answer."""


@contextmanager
def dask_executor(scheduler: str) -> Iterator[Executor]:
    """An executor on a Dask cluster.

    Args:
        scheduler: Its address.

    Raises:
        InputError: dask.distributed is not installed, the scheduler does not answer, has no workers, or runs other code.
    """
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        raise InputError("a Dask scheduler needs dask.distributed: pip install 'simtrain[dask]'") from None
    try:
        client = distributed.Client(scheduler, timeout=ANSWER_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        raise InputError(
            f"the scheduler {scheduler} does not answer within {ANSWER_S} s ({type(error).__name__}): is it running there?"
        ) from None
    try:
        versions = client.run(fingerprint)
        if not versions:
            raise InputError(f"the scheduler {scheduler} has no workers: start some with 'dask worker {scheduler}'")
        other = [worker for worker, version in versions.items() if version != fingerprint()]
        if other:
            raise InputError(f"workers run another version of simtrain than this process: {', '.join(sorted(other))}")
        yield client.get_executor()
    finally:
        client.close()
