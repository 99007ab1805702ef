"""The chain holds at every moment what the memory ledger says, for any choice of segments."""

import numpy as np
import pytest

import simtrain as st
from simtrain.core.precision import precision
from simtrain.core.runtimes import RUNTIMES
from simtrain.step import ledger, passes
from simtrain.step.occupancy import BLOCK_BYTES
from simtrain.step.remat import Segment
from simtrain.step.remat_chain import chain_of
from simtrain.step.remat_optimal import Span, least_budget_bytes, optimal_segments, peak_bytes
from simtrain.step.specialize import concrete_layers
from tests.step.books import ledger_of

SIZES = {"layers": 8, "hidden": 128, "heads": 4, "vocabulary": 512, "seq_len": 64}
WORKLOADS = {"gpt": SIZES, "llama": SIZES, "resnet18-cifar": {}, "vit-tiny": {}}


def random_spans(recomputable, seed: int) -> list[Span]:
    random = np.random.default_rng(seed)
    spans, at = [], 0
    while at < len(recomputable):
        stop = at + 1
        if recomputable[at] and random.random() < 0.6:
            while stop < len(recomputable) and recomputable[stop] and random.random() < 0.6:
                stop += 1
            spans.append(Span(at, stop, recomputed=True))
        else:
            spans.append(Span(at, stop, recomputed=False))
        at = stop
    return spans


def as_segments(workload, spans) -> tuple[Segment, ...]:
    kinds = [kind for kind, layer in enumerate(workload.layers) for _ in range(layer.repeats)]
    return tuple(Segment(tuple(range(s.start, s.stop)), tuple(kinds[s.start : s.stop]), s.recomputed) for s in spans)


def cut_into(monkeypatch, spans) -> None:
    """Makes the engine run these segments, whatever the strategy says."""
    for module in (passes, ledger):
        monkeypatch.setattr(module, "segments", lambda w, c: as_segments(w, spans))


def held_on_top(workload, recipe: str, runtime, accumulation: int) -> float:
    """Most that a step holds besides what it begins with (and the gradients, where earlier micro-batches left them)."""
    strategy = st.Strategy(micro_batch=2, precision=recipe, accumulation=accumulation, checkpoint="full")
    book = ledger_of(workload, strategy, runtime)
    totals = book.moments.sum(axis=1)
    base = totals[0]
    if accumulation > 1:
        sizes = [p.elements * 4 for layer in workload for p in layer.parameters if p.tied_to is None]
        base += sum(s + (-s % BLOCK_BYTES if runtime.memory.allocator == "caching" else 0) for s in sizes)
    return float(totals[1:-1].max() - base)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recipe", ["fp32", "fp16-amp"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_chains_hold_what_the_ledger_holds(name, recipe, accumulation, monkeypatch):
    workload, runtime = st.workload(name, **WORKLOADS[name]), RUNTIMES["torch-eager"]
    one = np.ones(workload.depth)
    concrete = concrete_layers(workload, precision(recipe), runtime)
    chain = chain_of(workload, concrete, 2, runtime, one, one, accumulating=accumulation > 1)
    for seed in range(6):
        spans = random_spans(chain.recomputable, seed)
        cut_into(monkeypatch, spans)
        assert peak_bytes(chain, spans) == pytest.approx(held_on_top(workload, recipe, runtime, accumulation), rel=1e-9)
        monkeypatch.undo()


@pytest.mark.parametrize("recipe", ["fp32", "fp16-amp"])
def test_optimal_plans_fit_in_the_ledger(recipe, monkeypatch):
    workload, runtime = st.workload("gpt", **SIZES), RUNTIMES["torch-eager"]
    one = np.ones(workload.depth)
    chain = chain_of(workload, concrete_layers(workload, precision(recipe), runtime), 2, runtime, one, one, accumulating=True)
    most = peak_bytes(chain, [Span(i, i + 1, recomputed=False) for i in range(len(chain))])
    least = least_budget_bytes(chain)
    for part in (0.0, 0.4, 0.8, 1.0):
        budget = least + part * (most - least)
        plan = optimal_segments(chain, budget)
        cut_into(monkeypatch, plan.spans)
        held = held_on_top(workload, recipe, runtime, 2)
        monkeypatch.undo()
        assert held == pytest.approx(plan.peak_bytes)
        assert held <= budget * (1 + 1e-9)
    assert plan.added_s == 0.0
