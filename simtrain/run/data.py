"""Feeding a step: storage, caches, CPU workers, prefetch and copies; when training waits for its input, and what cures it.

A loader as PyTorch's: workers prepare whole batches, batch i in worker i mod workers, delivered in order; each has at most `prefetch`
batches under way. Where nothing is random the period of a step is the longest of what each resource needs for a batch: the main process
(step and receipt), the workers, the cores, the storage, the copies. `simulate_loading` plays the same loader event by event.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.core.units import format_time

WORTH_SAYING = 0.01
"""A cure is named if it shortens the step by more than this share."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Where samples are read from.

    Attributes:
        bytes_per_s: Of the whole storage, to all readers together.
        latency_s: Opening a sample and its first byte, for a reader alone.
        reader_bytes_per_s: One reader's stream, at most.
        opens_per_s: Samples opened by all readers together (the metadata server of a shared file system), at most.
        nodes: Nodes that read from it at the same time; 1 for a local disk.
    """

    bytes_per_s: float = math.inf
    latency_s: float = 0.0
    reader_bytes_per_s: float = math.inf
    opens_per_s: float = math.inf
    nodes: int = 1

    def __post_init__(self) -> None:
        _positive(self, "bytes_per_s", "reader_bytes_per_s", "opens_per_s", "nodes")
        _not_negative(self, "latency_s")


@dataclass(frozen=True, slots=True)
class Loader:
    """How one rank's batches are prepared.

    Attributes:
        batch: Samples per step and rank.
        cpu_s: Decoding and augmenting a sample, on one core.
        read_bytes: Of a sample, as stored.
        batch_bytes: Of a prepared batch.
        workers: Processes per rank; 0 prepares in the main process, between steps.
        prefetch: Batches under way per worker.
        collate_s: Once a batch in a worker: putting samples together and sending them.
        receive_s: Once a batch in the main process.
        hit_rate: Share of samples that a cache holds.
        pin_bytes_per_s: Copy into pinned memory by a thread of its own; infinite where nothing is pinned.
        copy_bytes_per_s: Link to the device.
        overlapped_copy: Whether copies to the device run beside the step (pinned and non-blocking) or before it.
        cores: Of the node, for all its ranks.
        ranks: On the node.
        variation: Relative standard deviation of a batch's preparation time; only the simulation takes it into account.
    """

    batch: int
    cpu_s: float
    read_bytes: float = 0.0
    batch_bytes: float = 0.0
    workers: int = 0
    prefetch: int = 2
    collate_s: float = 0.0
    receive_s: float = 0.0
    hit_rate: float = 0.0
    pin_bytes_per_s: float = math.inf
    copy_bytes_per_s: float = math.inf
    overlapped_copy: bool = False
    cores: float = math.inf
    ranks: int = 1
    variation: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "batch", "prefetch", "pin_bytes_per_s", "copy_bytes_per_s", "cores", "ranks")
        _not_negative(self, "cpu_s", "read_bytes", "batch_bytes", "workers", "collate_s", "receive_s", "variation")
        if not 0 <= self.hit_rate <= 1:
            raise InputError(f"hit_rate is a share between 0 and 1, not {self.hit_rate!r}")


@dataclass(frozen=True, slots=True)
class Demand:
    """What one batch of one rank asks of each resource, in seconds.

    Attributes:
        storage_s: Of the whole storage, as if this rank's share of it were all there is.
        read_s: Of a worker that reads alone.
        cpu_s: Of a core, in a worker.
        pin_s: Of the pinning thread.
        copy_s: Of the link to the device.
    """

    storage_s: float
    read_s: float
    cpu_s: float
    pin_s: float
    copy_s: float


def demand(loader: Loader, storage: Storage) -> Demand:
    """Returns what a batch asks of each resource."""
    read = loader.batch * (1 - loader.hit_rate)
    sharing = loader.ranks * storage.nodes
    storage_s = read * sharing * max(loader.read_bytes / storage.bytes_per_s, 1 / storage.opens_per_s)
    alone_s = read * (storage.latency_s + loader.read_bytes / storage.reader_bytes_per_s)
    return Demand(
        storage_s=storage_s,
        read_s=max(alone_s, storage_s),
        cpu_s=loader.batch * loader.cpu_s + loader.collate_s,
        pin_s=loader.batch_bytes / loader.pin_bytes_per_s,
        copy_s=loader.batch_bytes / loader.copy_bytes_per_s,
    )


@dataclass(frozen=True, slots=True)
class Feeding:
    """A step with its input.

    Attributes:
        period_s: From one step to the next.
        step_s: Of the step alone.
        bound_by: The resource that sets the period: "step", "main process", "workers", "prefetch", "cores", "storage", "pinning" or
            "copy".
        bounds_s: What each resource needs for a batch.
        cures: What would shorten the period, best first, with what it would become.
        notes: What was left out.
    """

    period_s: float
    step_s: float
    bound_by: str
    bounds_s: Mapping[str, float]
    cures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def waiting_s(self) -> float:
        """Of each period, what the step alone would not need."""
        return self.period_s - self.step_s

    @property
    def input_bound(self) -> bool:
        """Whether training waits for its input for more than a hundredth of the time."""
        return self.waiting_s > WORTH_SAYING * self.period_s

    def __str__(self) -> str:
        head = f"{format_time(self.period_s)} a step, bound by {self.bound_by}"
        waits = f"waits {format_time(self.waiting_s)} of it for input" if self.input_bound else "input keeps up"
        return "\n".join([f"{head}: {waits}", *(f"  cure: {cure}" for cure in self.cures), *(f"  note: {note}" for note in self.notes)])


def feed(loader: Loader, step_s: float, storage: Storage | None = None, *, main_cpu_s: float | None = None) -> Feeding:
    """Predicts the period of a step with its input, in closed form.

    Exact where nothing is random and neither cores nor storage are contended; where they are, several workers slow each other and the
    main process, and the true period lies above this bound by up to a fifth (`simulate_loading` has it).

    Args:
        loader: How batches are prepared.
        step_s: Duration of the step, input at hand.
        storage: Where samples come from; by default nothing is read.
        main_cpu_s: Core time of the main process within a step; by default all of it.

    Raises:
        InputError: A duration that no step can have.
    """
    source = storage or Storage()
    bounds = _bounds(loader, step_s, source, _main_cpu_s(step_s, main_cpu_s))
    bound_by = max(bounds, key=lambda name: (bounds[name], name == "step", name == "workers"))
    period_s = bounds[bound_by]
    if bound_by == "step" and period_s > step_s * (1 + WORTH_SAYING):
        bound_by = "main process"
    notes = ("preparation times vary, which only the simulation prices",) if loader.variation else ()
    cures = _cures(loader, step_s, source, _main_cpu_s(step_s, main_cpu_s), period_s)
    return Feeding(period_s, step_s, bound_by, bounds, cures, notes)


def _main_cpu_s(step_s: float, main_cpu_s: float | None) -> float:
    if not (math.isfinite(step_s) and step_s > 0):
        raise InputError(f"step_s is a duration above zero, not {step_s!r}")
    if main_cpu_s is None:
        return step_s
    if not 0 <= main_cpu_s <= step_s:
        raise InputError(f"main_cpu_s lies between 0 and the step's {step_s:g} s, not {main_cpu_s!r}")
    return main_cpu_s


def _bounds(loader: Loader, step_s: float, storage: Storage, main_cpu_s: float) -> dict[str, float]:
    needs = demand(loader, storage)
    main_s = step_s + loader.receive_s + (0.0 if loader.overlapped_copy else needs.copy_s)
    cores = loader.cores / loader.ranks
    bounds = {
        "step": main_s,
        "cores": (needs.cpu_s + loader.receive_s + main_cpu_s) / cores,
        "storage": needs.storage_s,
        "copy": needs.copy_s,
        "pinning": needs.pin_s,
    }
    if loader.workers == 0:
        bounds["step"] += needs.read_s + needs.cpu_s + needs.pin_s
    else:
        bounds["workers"] = (needs.read_s + needs.cpu_s) / loader.workers
        # a batch is asked for when the one that many places before it is taken
        bounds["prefetch"] = (needs.read_s + needs.cpu_s + needs.pin_s) / (loader.workers * loader.prefetch)
    return bounds


def _cures(loader: Loader, step_s: float, storage: Storage, main_cpu_s: float, period_s: float) -> tuple[str, ...]:
    needs = demand(loader, storage)
    enough = max(1, math.ceil((needs.read_s + needs.cpu_s) / (step_s + loader.receive_s)))
    tried = {
        f"{enough} worker{'s' if enough > 1 else ''} instead of {loader.workers}": (replace(loader, workers=enough), storage),
        "the data set in a local cache": (replace(loader, hit_rate=1.0), storage),
        "storage twice as fast": (loader, replace(storage, bytes_per_s=2 * storage.bytes_per_s, opens_per_s=2 * storage.opens_per_s)),
        "half the decoding and augmenting (done ahead, or on the device)": (replace(loader, cpu_s=loader.cpu_s / 2), storage),
        "twice the cores": (replace(loader, cores=2 * loader.cores), storage),
        "pinned memory and copies beside the step": (replace(loader, overlapped_copy=True), storage),
        "twice the prefetch": (replace(loader, prefetch=2 * loader.prefetch), storage),
        "no pinning": (replace(loader, pin_bytes_per_s=math.inf), storage),
    }
    found = {text: max(_bounds(other, step_s, source, main_cpu_s).values()) for text, (other, source) in tried.items()}
    useful = sorted((after_s, text) for text, after_s in found.items() if after_s < (1 - WORTH_SAYING) * period_s)
    return tuple(f"{text}: {format_time(after_s)} a step" for after_s, text in useful)


def cache_hit_rate(cached_share: float, eviction: Literal["lru", "none"] = "lru") -> float:
    """Returns the share of samples found in a cache, from the second epoch on, when each epoch visits all in a new random order.

    A cache that keeps what came first finds what it holds. One that evicts the least recently used finds less: with c = the share that
    fits, a sample is found if fewer than c others came since, which for positions u, v in two random orders means
    (1 - u)(1 - v) > 1 - c counted from the far ends, a probability of c + (1 - c) ln(1 - c).

    Args:
        cached_share: Part of the data set that fits.
        eviction: "lru" or "none". Operating systems' page caches are near LRU, not exactly it.

    Raises:
        InputError: A share below zero.
        UnknownNameError: Another eviction.
    """
    if not cached_share >= 0:
        raise InputError(f"cached_share is 0 or more, not {cached_share!r}")
    if eviction not in ("lru", "none"):
        raise UnknownNameError("eviction", str(eviction), ("lru", "none"))
    if cached_share >= 1:
        return 1.0
    if eviction == "none":
        return cached_share
    return cached_share + (1 - cached_share) * math.log1p(-cached_share)


def _positive(noun: object, *names: str) -> None:
    for name in names:
        value = getattr(noun, name)
        if not value > 0:
            raise InputError(f"{name} is above zero, not {value!r}")


def _not_negative(noun: object, *names: str) -> None:
    for name in names:
        value = getattr(noun, name)
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is finite and not below zero, not {value!r}")
