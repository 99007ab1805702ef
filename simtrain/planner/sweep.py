"""`sweep`: many settings, one row each, on as many processes or machines as there are.

Points run through a `concurrent.futures.Executor`. What is finished is kept at once, so that neither a worker that dies nor an
interruption loses it, and the same sweep resumes where it stopped. Rows come in the order of the points, whoever computed them.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simtrain.core import catalog
from simtrain.core.errors import InputError, SimtrainError, StrategyError, UnknownNameError, UnsupportedError
from simtrain.core.hardware import Cluster
from simtrain.core.runtime import Runtime
from simtrain.core.runtimes import runtime as find_runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Workload
from simtrain.planner.cache import Cache, default_folder, key_of
from simtrain.planner.remote import dask_executor
from simtrain.step.predict import estimate, schedule, simulate

if TYPE_CHECKING:
    import pandas

READERS: dict[str, Callable[..., Any]] = {"estimate": estimate, "schedule": schedule, "simulate": simulate}
OWN_COLUMNS = ("workload", "cluster", "runtime", "reader", "seq_len", "strategy")
"""What a sweep may vary beside the fields of a strategy."""

RESTARTS = 3
"""How often a pool of processes is started anew after one of them died."""


class SweepStoppedError(SimtrainError):
    """A sweep that did not come to its end; what was finished is in the cache, and the same sweep resumes there."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a worker is asked. Names travel as names, so that a worker builds a model once and not for every point.

    Attributes:
        workload: What is trained.
        seq_len: Its sequence length; `None` for its own.
        cluster: On what.
        strategy: How.
        runtime: What carries it out; `None` for what the machines imply.
        reader: A name of `READERS`.
    """

    workload: Workload | str
    seq_len: int | None
    cluster: Cluster | str
    strategy: Strategy
    runtime: Runtime | None
    reader: str


@dataclass(frozen=True, slots=True)
class Point:
    """One setting.

    Attributes:
        given: What varies, as given.
        question: What is asked of it.
        key: Address of its result.
    """

    given: Mapping[str, Any]
    question: Question
    key: str


def run_point(question: Question) -> dict[str, Any]:
    """Predicts one setting; what cannot be or is not modelled is an answer too, with its reason under "error"."""
    workload, cluster = _workload(question.workload, question.seq_len), _cluster(question.cluster)
    try:
        result = READERS[question.reader](workload, cluster, question.strategy, runtime=question.runtime)
    except (StrategyError, UnsupportedError) as error:
        return {"strategy": str(question.strategy), "error": str(error)}
    row: dict[str, Any] = result.to_dict()
    return row | {"error": ""}


def sweep(
    workload: Workload | str,
    cluster: Cluster | str,
    points: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    *,
    strategy: Strategy | str = "data=1",
    runtime: Runtime | str | None = None,
    reader: str = "schedule",
    jobs: int = 1,
    scheduler: str = "",
    executor: Executor | None = None,
    cache: bool | str | Path = True,
    progress: Callable[[int, int], None] | None = None,
) -> pandas.DataFrame:
    """Predicts a grid or a list of settings.

    Args:
        workload: A workload or the name of a preset.
        cluster: A cluster or its text.
        points: A grid, `{"micro_batch": [1, 2], "checkpoint": ["none", "full"]}`, of which every combination is taken, or a list of
            settings. Names are the fields of a strategy and those of `OWN_COLUMNS`.
        strategy: What does not vary.
        runtime: What carries it out.
        reader: "estimate", "schedule" or "simulate".
        jobs: Processes; 1 computes here.
        scheduler: Address of a Dask scheduler, such as `tcp://host:8786`.
        executor: One of your own instead.
        cache: Whether finished points are kept and taken from the user's cache, or the folder of a cache.
        progress: Called with (done, total).

    Returns:
        A pandas DataFrame in the order of the points: what was given, then the fields of the result (nested ones joined with a dot), and
        "error" for what cannot be.

    Raises:
        InputError: Nothing to do, unknown names, a cache that cannot be used, or a scheduler that does not answer.
        SweepStoppedError: Workers died again and again.
    """
    rows = sweep_rows(
        read_points(workload, cluster, points, strategy=strategy, runtime=runtime, reader=reader),
        jobs=jobs,
        scheduler=scheduler,
        executor=executor,
        cache=cache,
        progress=progress,
    )
    return to_frame(rows)


def to_frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Rows as a DataFrame.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise InputError("a sweep as a DataFrame needs pandas: pip install 'simtrain[frame]'") from None
    return pandas.json_normalize([dict(row) for row in rows], sep=".")


def read_points(
    workload: Workload | str,
    cluster: Cluster | str,
    points: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    *,
    strategy: Strategy | str = "data=1",
    runtime: Runtime | str | None = None,
    reader: str = "schedule",
) -> tuple[Point, ...]:
    """Turns a grid or a list into points, names into nouns.

    Raises:
        InputError: Nothing to do, or unknown names.
    """
    if isinstance(points, Mapping):
        listed = [dict(zip(points, values, strict=True)) for values in product(*(_several(n, v) for n, v in points.items()))]
    else:
        listed = [dict(p) for p in points]
    if not listed or not all(listed):
        raise InputError("there is nothing to sweep: give at least one field with one value, such as {'micro_batch': [1, 2]}")
    known = (*OWN_COLUMNS, *(f.name for f in fields(Strategy) if f.name != "plan"))
    base = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    made = []
    for given in listed:
        for name in given:
            if name not in known:
                raise UnknownNameError("field of a sweep", name, known)
        own = {n: v for n, v in given.items() if n in OWN_COLUMNS}
        chosen = own.get("reader", reader)
        if chosen not in READERS:
            raise UnknownNameError("reader", str(chosen), READERS)
        typed = _typed({n: v for n, v in given.items() if n not in OWN_COLUMNS})
        start = Strategy.parse(own["strategy"]) if "strategy" in own else base
        framework = own.get("runtime", runtime)
        asked = Question(
            workload=own.get("workload", workload),
            seq_len=None if own.get("seq_len") is None else int(own["seq_len"]),
            cluster=_travelling(own.get("cluster", cluster)),
            strategy=start.with_(**typed),
            runtime=find_runtime(framework) if isinstance(framework, str) else framework,
            reader=chosen,
        )
        content = (_content(asked.workload, asked.seq_len), _cluster_content(asked.cluster))
        made.append(
            Point({n: typed.get(n, v) for n, v in given.items()}, asked, key_of(*content, asked.strategy, asked.runtime, asked.reader))
        )
    return tuple(made)


def _travelling(cluster: Cluster | str) -> Cluster | str:
    """Files of this machine are read here."""
    return _cluster(cluster) if isinstance(cluster, str) and ".toml" in cluster else cluster


def _content(workload: Workload | str, length: int | None) -> str:
    """What a workload says of itself."""
    return _named_content(workload, length) if isinstance(workload, str) else repr(_workload(workload, length))


@lru_cache(maxsize=64)
def _named_content(name: str, length: int | None) -> str:
    return repr(_workload(name, length))


def _cluster_content(cluster: Cluster | str) -> str:
    return repr(_cluster(cluster))


def _several(name: str, values: Any) -> Sequence[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"sweep: {name} must be a list of values, such as [{values!r}]")
    return values


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    alone = Strategy.from_dict(dict(given))
    return {name: getattr(alone, name) for name in given}


def _workload(given: Workload | str, length: int | None) -> Workload:
    if isinstance(given, str):
        return _named_workload(given, length)
    if length is not None:
        raise InputError("seq_len can vary only where the workload is given by name")
    return given


@lru_cache(maxsize=16)
def _named_workload(name: str, length: int | None) -> Workload:
    return catalog.workload(name, seq_len=length)


def _cluster(given: Cluster | str) -> Cluster:
    return _named_cluster(given) if isinstance(given, str) else given


@lru_cache(maxsize=16)
def _named_cluster(name: str) -> Cluster:
    return catalog.cluster(name)


def sweep_rows(
    points: Sequence[Point],
    *,
    jobs: int = 1,
    scheduler: str = "",
    executor: Executor | None = None,
    cache: bool | str | Path = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Predicts points and returns plain rows in their order; see `sweep`."""
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, not {jobs}")
    if sum((jobs > 1, bool(scheduler), executor is not None)) > 1:
        raise InputError("give one of jobs, scheduler and executor")
    store = None if cache is False else Cache.at(default_folder() if cache is True else Path(cache))
    run = _Run(tuple(points), [p.key for p in points], store, progress)
    run.take_known()
    if run.missing:
        if executor is not None or scheduler or jobs > 1:
            _check_travels([points[i].question for i in run.missing])
        if executor is not None:
            run.through(executor)
        elif scheduler:
            with dask_executor(scheduler) as remote:
                run.through(remote)
        elif jobs > 1:
            run.through_processes(jobs)
        else:
            for index in run.missing:
                run.finish(index, run_point(points[index].question))
    return [{"point": i, **p.given, **run.rows[k]} for i, (p, k) in enumerate(zip(points, run.keys, strict=True))]


def _check_travels(questions: Sequence[Question]) -> None:
    """Refuses models that exist in this process only.

    Raises:
        InputError: Some cannot be sent to another process.
    """
    for question in {id(q.workload): q for q in questions if isinstance(q.workload, Workload)}.values():
        try:
            pickle.dumps(question.workload)
        except (AttributeError, TypeError, pickle.PicklingError):
            name = question.workload.name if isinstance(question.workload, Workload) else question.workload
            raise InputError(f"the workload {name!r} cannot be sent to other processes: give it by its name, or use jobs=1") from None


@dataclass(slots=True)
class _Run:
    """A sweep under way."""

    points: tuple[Point, ...]
    keys: list[str]
    store: Cache | None
    progress: Callable[[int, int], None] | None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take_known(self) -> None:
        """Takes what is kept."""
        for key in self.keys:
            known = self.store.get(key) if self.store else None
            if known is not None:
                self.rows[key] = known
        self._tell()

    @property
    def missing(self) -> list[int]:
        """Points to compute; equal ones once."""
        first = {key: i for i, key in reversed(list(enumerate(self.keys)))}
        return [i for i, key in enumerate(self.keys) if key not in self.rows and first[key] == i]

    def finish(self, index: int, row: dict[str, Any]) -> None:
        """Keeps a result at once."""
        self.rows[self.keys[index]] = row
        if self.store:
            self.store.put(self.keys[index], row)
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(sum(k in self.rows for k in self.keys), len(self.keys))

    def through(self, executor: Executor) -> None:
        """Computes what is missing, as workers finish it.

        Raises:
            SweepStoppedError: A worker failed in a way that the executor does not repair.
        """
        futures: dict[Future[dict[str, Any]], int] = {executor.submit(run_point, self.points[i].question): i for i in self.missing}
        try:
            for future in as_completed(futures):
                self.finish(futures[future], future.result())
        except (KeyboardInterrupt, SimtrainError, BrokenProcessPool):
            raise
        except Exception as error:
            raise self.stopped(f"a worker failed ({type(error).__name__}: {error})") from error
        finally:
            for future in futures:
                future.cancel()

    def through_processes(self, jobs: int) -> None:
        """Computes what is missing in processes of this machine; those that die are replaced.

        Raises:
            SweepStoppedError: They die again and again.
        """
        for _ in range(RESTARTS):
            pool = ProcessPoolExecutor(min(jobs, len(self.missing)), mp_context=multiprocessing.get_context("spawn"))
            try:
                self.through(pool)
            except BrokenProcessPool:
                continue
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            return
        hint = "out of memory? a script of your own must guard what it runs with `if __name__ == '__main__':`"
        raise self.stopped(f"worker processes died {RESTARTS} times ({hint})")

    def stopped(self, reason: str) -> SweepStoppedError:
        """An error that says what is kept."""
        done = sum(k in self.rows for k in self.keys)
        kept = "they are kept, and the same sweep resumes there" if self.store else "nothing was kept, because there is no cache"
        return SweepStoppedError(f"{reason} after {done} of {len(self.keys)} points: {kept}")
