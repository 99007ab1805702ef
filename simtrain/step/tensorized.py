"""Writes a workload with the weights of its blocks as products of small tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from simtrain.core import catalog
from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.core.polynomial import Polynomial
from simtrain.core.tensor_train import Contraction, contraction
from simtrain.core.tensorize import Tensorization, parse_tensorize
from simtrain.core.workload import Form, Layer, OperatorKind, Workload


def tensorize(workload: Workload | str, form: str) -> Workload:
    """Returns a workload whose blocks have tensorized weights, as their real modules run them.

    Operators, parameters and activations are those of `simtrain.torch.tensorize` with the same rank or compression, applied to the layers
    inside blocks. What it does to the loss is not predicted.

    Args:
        workload: A model of the catalog, or its name.
        form: As a strategy says it, such as "low-rank:rank=64" or "tucker:compression=4" (`simtrain.core.tensorize`).

    Raises:
        StrategyError: The form cannot be read, or no layer of the blocks becomes smaller.
        UnsupportedError: The model is known by its operators alone, or has layers for which the form is not modelled.
    """
    work = catalog.workload(workload) if isinstance(workload, str) else workload
    parsed = parse_tensorize(form)
    if parsed is None:
        return work
    if work.reform is None:
        raise UnsupportedError(
            f"{work.name} is known by its operators alone, so that tensorize={form} cannot write it anew: convert the module by "
            "simtrain.torch.tensorize, then capture it"
        )
    made = _written(work, work.reform, parsed)
    if made.parameter_count >= work.parameter_count:
        raise StrategyError(f"tensorize={form} makes no layer in the blocks of {work.name} smaller: {_advice(parsed, work)}")
    return made


def train_notes(workload: Workload, samples: int, ranks_of_sequence: int = 1) -> tuple[str, ...]:
    """Says of linear layers that are trains in which order they are contracted, and from how many rows on that is the best.

    Args:
        workload: With such layers or without.
        samples: Of a micro-batch.
        ranks_of_sequence: Ranks that share every sequence.
    """
    plans = [plan for layer in workload.layers for plan in _trains(layer)]
    if not plans:
        return ()
    rows = max(round(tokens(samples, workload.sequence) / ranks_of_sequence) for _, tokens in plans)
    done = sum(plan.flops(rows) for plan, _ in plans)
    best = sum(plan.flops(rows) / plan.excess(rows) for plan, _ in plans)
    least = max(plan.best_from for plan, _ in plans)
    said = f"trains meet {rows} rows of a micro-batch in the order with the fewest FLOPs for many, which none beats from {least} on"
    lines = [said if rows >= least else f"{said}: here it takes {done / best - 1:.1%} more than the best"]
    if whole := sum(plan.makes_weight for plan, _ in plans):
        lines.append(
            f"for {whole} of the {len(plans)} kinds of trains that order multiplies the cores to the whole weight in every micro-batch: it "
            "saves no arithmetic and keeps that weight for backward; smaller ranks let the input meet one core after the other"
        )
    return tuple(lines)


def _trains(layer: Layer) -> list[tuple[Contraction, Polynomial]]:
    """Trains of a layer in closed form, with the rows of their input."""
    cores: dict[str, list[tuple[int, ...]]] = {}
    for p in layer.parameters:
        name, found, _ = p.name.partition(".cores.")
        if found:
            cores.setdefault(name, []).append(p.shape)
    products = {op.name: op for op in layer.forward if op.kind is OperatorKind.GEMM} if cores else {}
    made = []
    for name, shapes in cores.items():
        _, inner, outer, ranks = zip(*shapes, strict=True)
        plan = contraction(inner, outer, ranks[:-1])
        if last := products.get(f"{name}.{len(plan.steps) - 1}"):
            made.append((plan, last.dims[1].size * (1 / plan.steps[-1].extents[0])))
    return made


@lru_cache(maxsize=64)
def _written(workload: Workload, reform: Callable[[Form], Workload], form: Tensorization) -> Workload:
    """The workload in this form, which it keeps in whatever form it is written later."""
    made = reform(Form(tensorized=form))
    before, after = (_block_parameters(w) for w in (workload, made))
    line = f"{form.kind} weights leave the blocks {after / before:.1%} of their parameters; what this does to the loss is not predicted"
    return replace(made, assumptions=(*made.assumptions, line), reform=lambda other: reform(replace(other, tensorized=form)))


def _block_parameters(workload: Workload) -> int:
    return sum(layer.parameter_count * layer.repeats for layer in workload.layers if layer.block)


def _convolves(workload: Workload) -> bool:
    return any(len(p.shape) == 4 for layer in workload.layers if layer.block for p in layer.parameters)


def _advice(form: Tensorization, workload: Workload) -> str:
    convolves = _convolves(workload)
    if convolves and form.kind == "low-rank":
        return "they are convolutions, for which tucker and tensor-train are"
    if not convolves and form.kind == "tucker":
        return "they are linear layers, for which low-rank and tensor-train are"
    return "give a smaller rank" if form.rank else "give a smaller compression"


__all__ = ["tensorize", "train_notes"]
