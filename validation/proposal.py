"""A proposal's table, claim by claim: four components predicted alone, left out one by one and together, by architecture.

The claims are of ResNet-50 on CIFAR-10 and GPT-2 on WikiText-2, trained on four GeForce RTX 3090. Every combination of the components is
priced by the step floor and played to the target over a growing noise scale:

* *dynamic batch*: accumulation and micro-batch follow the noise scale, within memory, beside one batch throughout;
* *precision*: fp16 under autocast, beside fp32;
* *checkpointing*: every block recomputed, beside none (ResNets then update their batch norms' running statistics twice);
* *learning rate*: follows the batch as the law asks, beside the rate of the first batch. What warm-up and decay do to the number of steps
  is in no law used here, so without a dynamic batch this component changes nothing.

Time is relative: one target, fewer or cheaper steps. Quality is not predicted; it is measured, see `validation.quality`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from typing import Any

from simtrain.core import catalog
from simtrain.core.errors import InputError, UnknownNameError
from simtrain.core.strategy import Strategy
from simtrain.run.batch_phases import training_to_loss
from simtrain.run.batch_policy import BatchChoice
from simtrain.run.batch_prices import PriceList, price_list
from simtrain.run.batch_run import BatchRun, Noise, Training, play, play_fixed
from simtrain.run.course import Learning
from simtrain.run.loss_laws import CHINCHILLA, KAPLAN_NOISE
from validation.batch_jobs import measured_noise

COMPONENTS = ("dynamic batch", "precision", "checkpointing", "learning rate")
CLUSTER = "4x rtx-3090"
BOARDS = ("4x rtx-3090", "4x rtx-3090 x8", "4x rtx-3090 x16", "4x rtx-3090 nvlink")
NOISE_FACTORS = (1 / 3, 1.0, 3.0)
"""The noise scale is taken from other trainings: how far it may be off is an assumption, and what that changes is shown."""

_DECISIONS = 200  # about, over a run: more change nothing

CLAIMS = {
    "time": "23 to 28 % less time to convergence",
    "memory": "25 % less memory",
    "throughput": "27 to 28 % more throughput",
    "scaling": "94.6 % scaling on 4 cards",
    "quality": "quality within 0.5 %",
}


@dataclass(frozen=True, slots=True)
class Job:
    """An architecture and its data set.

    Attributes:
        name: Of both.
        workload: In the catalog.
        options: Of the workload.
        baseline: What it is compared with: the batch of each card, fp32, nothing recomputed.
        micro_batches: To choose from.
        max_batch: That a dynamic batch may reach.
        task: The small real training of the same kind (`validation.quality`).
    """

    name: str
    workload: str
    options: tuple[tuple[str, Any], ...]
    baseline: Strategy
    micro_batches: tuple[int, ...]
    max_batch: int
    task: str

    def noise(self) -> tuple[float, Noise, str]:
        """Returns steps without noise, the noise scale in samples by progress, and where both come from."""
        if self.task == "digits":
            return *measured_noise("cifar10"), "measured in a ResNet-18 on CIFAR-10 (Pollux's traces), taken for ResNet-50"
        size = catalog.workload(self.workload).parameter_count
        text = training_to_loss(Learning(CHINCHILLA, float(size), KAPLAN_NOISE), 3.4, 1024, lambda _b, _k: 1.0)
        source = "Kaplan's by loss, down to 3.4 along Chinchilla's law; repeating the few tokens of WikiText-2 is not in it"
        return text.noise_free_steps, text.noise_scale, source


JOBS = {
    job.name: job
    for job in (
        Job(
            "resnet50-cifar10",
            "resnet50-cifar",
            (("recomputable", True),),
            Strategy(data=4, micro_batch=32, optimizer="sgd-momentum"),
            (32, 64, 128, 256, 512, 1024),
            4096,
            "digits",
        ),
        Job("gpt2-wikitext2", "gpt2-small", (), Strategy(data=4, micro_batch=4), (2, 4, 8, 16, 32), 512, "text"),
    )
}
"""Baselines are assumptions: the claims come without theirs."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A combination of components, predicted.

    Attributes:
        components: That are on.
        time_h: To the target, by the law.
        throughput: Samples per second, over the whole run.
        memory_bytes: Peak on a card over the run.
        equal_memory_bytes: Peak on a card at the baseline's micro-batch.
        scaling: Throughput over that of one card times the cards, at the batch that takes most of the time.
        first_batch: Samples.
        last_batch: Samples.
    """

    components: tuple[str, ...]
    time_h: float
    throughput: float
    memory_bytes: float
    equal_memory_bytes: float
    scaling: float
    first_batch: int
    last_batch: int


class Predictor:
    """Predicts variants of one job on one cluster.

    Args:
        job: What is trained.
        cluster: On what.
        noise_factor: On the noise scale.
    """

    def __init__(self, job: Job, cluster: str = CLUSTER, noise_factor: float = 1.0) -> None:
        self.job, self.cluster = job, cluster
        self._workload = catalog.workload(job.workload, **dict(job.options))
        least, noise, self.noise_source = job.noise()
        self._least, self._noise = least, (lambda progress: noise_factor * noise(progress))
        self._prices = cache(self._price)

    def with_noise(self, factor: float) -> Predictor:
        """Returns a predictor with another factor on the noise scale, which shares the prices."""
        other = Predictor(self.job, self.cluster, factor)
        other._prices = self._prices
        return other

    def variant(self, components: Sequence[str]) -> Variant:
        """Predicts a combination.

        Raises:
            UnknownNameError: No such component.
        """
        for name in components:
            if name not in COMPONENTS:
                raise UnknownNameError("component", name, COMPONENTS)
        how = self._strategy(components)
        prices = self._prices(how)
        run = self._run(components, prices)
        micro = (run.batch / (run.accumulation * how.data)).astype(int)
        longest = self._longest(run, micro)
        one = self._prices(how.with_(data=1))(*longest)
        return Variant(
            components=tuple(c for c in COMPONENTS if c in components),
            time_h=run.time_to_target_s / 3600,
            throughput=run.samples / run.time_to_target_s,
            memory_bytes=max(prices.memory_bytes[int(b)] for b in set(micro.tolist())),
            equal_memory_bytes=prices.memory_bytes[self.job.baseline.micro_batch],
            scaling=one / prices(*longest),
            first_batch=int(run.batch[0]),
            last_batch=int(run.batch[-1]),
        )

    def _strategy(self, components: Sequence[str]) -> Strategy:
        return self.job.baseline.with_(
            precision="fp16-amp" if "precision" in components else "fp32", checkpoint="full" if "checkpointing" in components else "none"
        )

    def _price(self, how: Strategy) -> PriceList:
        return price_list(self._workload, self.cluster, how, self.job.micro_batches)

    def _run(self, components: Sequence[str], prices: PriceList) -> BatchRun:
        """The fastest of several ceilings on the batch: a controller whose learning rate stays must know how far it may go."""
        base = self.job.baseline
        start = BatchChoice(base.micro_batch, base.accumulation, base.data)
        kept = None if "learning rate" in components else start.batch
        training = Training(self._least, self._noise, prices, kept)
        if "dynamic batch" not in components:
            return play_fixed(training, start, stretches=_DECISIONS)
        ceilings = [start.batch * 2**i for i in range(1 + int(math.log2(self.job.max_batch / start.batch)))]
        if kept is None:  # the law itself knows where to stop
            ceilings = ceilings[-1:]
        measured = max(1, round(play_fixed(training, start, stretches=_DECISIONS).steps / _DECISIONS))
        runs = [
            play(prices.policy(max_batch=c, max_accumulation=c // start.batch), training, start, measured_steps=measured) for c in ceilings
        ]
        return min(runs, key=lambda run: run.time_to_target_s)

    @staticmethod
    def _longest(run: BatchRun, micro: Any) -> tuple[int, int]:
        ends = [*run.time_s[1:], run.time_to_target_s]
        spent: dict[tuple[int, int], float] = {}
        for size, k, first, end in zip(micro.tolist(), run.accumulation.tolist(), run.time_s, ends, strict=True):
            spent[size, int(k)] = spent.get((size, int(k)), 0.0) + end - first
        return max(spent, key=lambda choice: spent[choice])


@dataclass(frozen=True, slots=True)
class JobTable:
    """Everything predicted for one architecture.

    Attributes:
        job: Name.
        variants: Every combination; the baseline first, all together last.
        ranges: By combination of components, the least and largest share of time saved if the noise scale is three times smaller or larger.
        interactions: By pair, the time of both together over what their separate effects make, less one: below zero they help each other.
        scaling: By board, that of the baseline and of all together.
        noise_source: Of the noise scale.
    """

    job: str
    variants: tuple[Variant, ...]
    ranges: dict[tuple[str, ...], tuple[float, float]]
    interactions: dict[tuple[str, str], float]
    scaling: dict[str, tuple[float, float]]
    noise_source: str

    def find(self, *components: str) -> Variant:
        """Returns the variant with exactly these components."""
        return next(v for v in self.variants if set(v.components) == set(components))

    def without(self, component: str) -> Variant:
        """Returns all but one component."""
        return self.find(*(c for c in COMPONENTS if c != component))

    def saved(self, variant: Variant) -> float:
        """Share of the baseline's time that a variant saves."""
        return 1 - variant.time_h / self.find().time_h

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "job": self.job,
            "noise_scale": self.noise_source,
            "variants": [asdict(v) | {"time_saved": self.saved(v), "time_saved_range": self.ranges[v.components]} for v in self.variants],
            "interactions": {" x ".join(pair): value for pair, value in self.interactions.items()},
            "scaling": {board: dict(zip(("baseline", "all"), pair, strict=True)) for board, pair in self.scaling.items()},
        }


def predict_job(name: str, cluster: str = CLUSTER, boards: Sequence[str] = BOARDS) -> JobTable:
    """Predicts every combination of components for one architecture.

    Args:
        name: One of `JOBS`.
        cluster: Four devices.
        boards: Clusters whose scaling is compared.

    Raises:
        UnknownNameError: No such job.
        InputError: The cluster has fewer than four devices.
    """
    if name not in JOBS:
        raise UnknownNameError("job", name, JOBS)
    job = JOBS[name]
    if (devices := catalog.cluster(cluster).size) < job.baseline.data:
        raise InputError(f"the table is of {job.baseline.data} devices; {cluster!r} has {devices}")
    subsets = [pair for count in range(len(COMPONENTS) + 1) for pair in combinations(COMPONENTS, count)]
    first = Predictor(job, cluster)
    predictors = [first.with_noise(factor) for factor in NOISE_FACTORS]
    by_factor = [[p.variant(subset) for subset in subsets] for p in predictors]
    variants = tuple(by_factor[NOISE_FACTORS.index(1.0)])
    ranges = {v.components: _ends([1 - rows[i].time_h / rows[0].time_h for rows in by_factor], min, max) for i, v in enumerate(variants)}
    time = {frozenset(v.components): v.time_h for v in variants}
    nothing = time[frozenset()]
    interactions = {
        (a, b): time[frozenset((a, b))] * nothing / (time[frozenset((a,))] * time[frozenset((b,))]) - 1
        for a, b in combinations(COMPONENTS, 2)
    }
    scaling = {}
    for board in boards:
        there = Predictor(job, board)
        scaling[board] = (there.variant(()).scaling, there.variant(COMPONENTS).scaling)
    return JobTable(name, variants, ranges, interactions, scaling, first.noise_source)


def _ends(values: list[float], least: Callable[[list[float]], float], most: Callable[[list[float]], float]) -> tuple[float, float]:
    return least(values), most(values)
