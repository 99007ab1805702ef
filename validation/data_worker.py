"""The process that loads real data: reads cases as JSON from its input, writes one JSON line per measurement to its output.

Run as `python -P -m validation.data_worker` by `validation.data_loading`, with one thread per process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sized
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

POOL_BYTES = 64 * 2**20
"""More than caches hold."""

QUIET, ATTEMPTS = 0.03, 3
"""Share of the cores' time that other processes take in an undisturbed measurement; how often a disturbed one is repeated."""


class ImageFiles(Dataset[Tensor], Sized):
    """Compressed images in files: read, decompressed, flipped, cropped and normalised, as an image data set is.

    Args:
        folder: Where the files are written.
        side: Pixels along a side, before a crop to 7/8.
        files: How many; more samples than that read them again.
        samples: Length of the data set.
    """

    def __init__(self, folder: Path, side: int, files: int = 64, samples: int = 10**6) -> None:
        self.side, self.samples = side, samples
        rng = np.random.default_rng(side)
        self.paths = [folder / f"{side}_{number}.z" for number in range(files)]
        for path in self.paths:
            smooth = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            path.write_bytes(zlib.compress((smooth + rng.integers(0, 4, smooth.shape, dtype=np.uint8)).tobytes()))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        path, side = self.paths[index % len(self.paths)], self.side
        pixels = np.frombuffer(zlib.decompress(path.read_bytes()), dtype=np.uint8).reshape(side, side, 3)
        edge, crop = index % (side // 8), side * 7 // 8
        image = torch.from_numpy(pixels[edge : edge + crop, edge : edge + crop, :].copy()).permute(2, 0, 1).float()
        image = image.flip(2) if index % 2 else image
        return image.sub_(127.5).div_(64.0).contiguous()


class Ready(Dataset[Tensor], Sized):
    """Samples that take no time: what is left is the loader itself.

    Args:
        elements: Of a sample.
    """

    def __init__(self, elements: int) -> None:
        self.pool = list(torch.zeros(max(2, POOL_BYTES // (4 * elements)), elements))  # as cold as samples just made

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Tensor:
        sample: Tensor = self.pool[index % len(self.pool)]
        return sample


class Step:
    """Stands for a training step on the CPU: matrix products of a fixed size, a given number of them.

    Args:
        products: How many.
    """

    def __init__(self, products: int) -> None:
        self._a, self._products = torch.randn(256, 256), products

    def __call__(self) -> None:
        """Runs it."""
        for _ in range(self._products):
            torch.mm(self._a, self._a)


def receive(batch: Tensor) -> None:
    """Touches every page of a batch, as whoever computes with it does."""
    batch.view(-1)[::1024].sum()


def run_loader(data: Dataset[Tensor], batch: int, workers: int, step: Step, lasts_s: float, attempts: int = 1) -> dict[str, float]:
    """Measures wall time, CPU time of the main process and of the workers per batch, once the loader has settled.

    Args:
        data: What is loaded.
        batch: Samples.
        workers: Of the loader.
        step: What the main process does with a batch.
        lasts_s: About so long, and as many batches as fit, within limits.
        attempts: The one least disturbed by other processes counts; one that hardly was ends the search.
    """
    best: dict[str, float] = {}
    for _ in range(attempts):
        times = _run_loader(data, batch, workers, step, lasts_s)
        if not best or times["foreign"] < best["foreign"]:
            best = times
        if best["foreign"] < QUIET:
            break
    return best


def _run_loader(data: Dataset[Tensor], batch: int, workers: int, step: Step, lasts_s: float) -> dict[str, float]:
    loader = DataLoader(data, batch, num_workers=workers, shuffle=False, prefetch_factor=2 if workers else None)
    batches: Iterator[Tensor] = iter(loader)
    spans = [_go(batches, step) for _ in range(4 * workers + 4)]
    rounds = max(min(round(lasts_s / median(spans[-max(workers, 2) * 2 :])), 400), 12) // max(workers, 1) * max(workers, 1)
    machine_s, children_s, main_s, start_s = _machine_s(), _children_s(), time.process_time(), time.perf_counter()
    for _ in range(rounds):
        _go(batches, step)
    wall_s, main_s, children_s = time.perf_counter() - start_s, time.process_time() - main_s, _children_s() - children_s
    foreign = max(_machine_s() - machine_s - main_s - children_s, 0.0) / (wall_s * len(os.sched_getaffinity(0)))
    del batches, loader
    return {"wall_s": wall_s / rounds, "main_cpu_s": main_s / rounds, "workers_cpu_s": children_s / rounds, "foreign": foreign}


def _go(batches: Iterator[Tensor], step: Step) -> float:
    start = time.perf_counter()
    receive(next(batches))
    step()
    return time.perf_counter() - start


def _children_s() -> float:
    """CPU time of the workers so far, all their threads."""
    total = 0
    for child in multiprocessing.active_children():
        for thread in Path(f"/proc/{child.pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


def _machine_s() -> float:
    """Time that the cores were busy so far, whoever kept them so."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return (sum(map(int, fields[:3])) + sum(map(int, fields[5:8]))) / os.sysconf("SC_CLK_TCK")


def alone(data: ImageFiles, batch: int, step: Step, lasts_s: float) -> dict[str, float]:
    """Measures what a prediction is made from: CPU time of a sample, a batch of them being alive at once, and of a step."""
    sample_s, step_s = [], []
    deadline = time.perf_counter() + lasts_s
    for index in count():
        if index and time.perf_counter() > deadline:
            break
        start = time.process_time()
        samples = [data[batch * index + offset] for offset in range(batch)]
        del samples
        sample_s.append((time.process_time() - start) / batch)
        start = time.process_time()
        step()
        step_s.append(time.process_time() - start)
    return {"sample_s": median(sample_s), "step_s": median(step_s)}


def waiting(data: ImageFiles, batch: int, wait_s: float, lasts_s: float) -> float:
    """Measures CPU time of a sample in a process of its own that waits before each batch, as a worker does whose prefetch is full.

    A core that slept or did something else has cold caches: a sample then takes an eighth to a third more than one right after another.
    """
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=_waiting, args=(answer, data, batch, wait_s, lasts_s))
    process.start()
    sample_s: float = answer.get()
    process.join()
    return sample_s


def _waiting(answer: Any, data: ImageFiles, batch: int, wait_s: float, lasts_s: float) -> None:
    times: list[float] = []
    deadline = time.perf_counter() + lasts_s
    for index in count():
        if len(times) >= 5 and time.perf_counter() > deadline:
            break
        time.sleep(wait_s)
        start = time.process_time()
        samples = [data[batch * index + offset] for offset in range(batch)]
        del samples
        times.append((time.process_time() - start) / batch)
    answer.put(median(times[1:]))


def calibrate(sizes: list[int], lasts_s: float) -> list[dict[str, float]]:
    """Measures the loader itself at several batch sizes in bytes: with a worker, and in the main process."""
    rows = []
    for size in sizes:
        data, nothing = Ready(size // 4 // 16), Step(0)
        worker, own = (run_loader(data, 16, workers, nothing, lasts_s) for workers in (1, 0))
        rows.append(
            {"batch_bytes": size, "send_s": worker["workers_cpu_s"], "receive_s": worker["main_cpu_s"], "collate_s": own["main_cpu_s"]}
        )
    return rows


def _measure_case(case: dict[str, Any], folder: Path, lasts_s: float) -> dict[str, Any]:
    """Measures a case: its parts alone, then the loader with each number of workers."""
    data, step = ImageFiles(folder, case["side"]), Step(case["products"])
    parts = alone(data, case["batch"], step, lasts_s)
    parts["worker_sample_s"] = waiting(data, case["batch"], parts["step_s"], lasts_s)
    batch_bytes = data[0].numel() * 4 * case["batch"]
    runs = {str(workers): run_loader(data, case["batch"], workers, step, lasts_s, ATTEMPTS) for workers in case["workers"]}
    return {"name": case["name"], "batch_bytes": batch_bytes, **parts, "runs": runs}


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    print(json.dumps({"calibration": calibrate(request["calibrate"], request["lasts_s"])}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in request["cases"]:
            print(json.dumps(_measure_case(case, Path(folder), request["lasts_s"])), flush=True)


if __name__ == "__main__":
    main()
