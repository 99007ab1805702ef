"""Writes a workload with the weights of its blocks as products of small tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from simtrain.core import catalog
from simtrain.core.errors import StrategyError, UnsupportedError
from simtrain.core.tensorize import Tensorization, parse_tensorize
from simtrain.core.workload import Form, Workload


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
    if parsed.kind == "tensor-train" and not _convolves(work):
        raise UnsupportedError(
            f"tensorize={form} is modelled for convolutions, of which the blocks of {work.name} have none (a train of linear layers copies "
            "what PyTorch's einsum makes of it): use low-rank, or convert the module by simtrain.torch.tensorize and capture it"
        )
    if made.parameter_count >= work.parameter_count:
        raise StrategyError(f"tensorize={form} makes no layer in the blocks of {work.name} smaller: {_advice(parsed, work)}")
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
    if not convolves and form.kind != "low-rank":
        return "they are linear layers, for which low-rank is"
    return "give a smaller rank" if form.rank else "give a smaller compression"


__all__ = ["tensorize"]
