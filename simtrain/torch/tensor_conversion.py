"""Converts linear layers and convolutions of a model to products of small tensors, with ranks under an error or a compression.

Low rank by truncated singular values (Eckart and Young 1936), Tucker by truncating either channel mode (De Lathauwer et al. 2000), tensor
trains by one truncation after the other (Oseledets 2011). The papers are recalled, not looked up; the error of every weight is computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simtrain.core.errors import InputError, UnknownNameError, UnsupportedError
from simtrain.core.tensor_train import factors
from simtrain.core.tensorize import KINDS, Tensorization, TensorizeKind
from simtrain.torch.tensorized import LowRankLinear, TensorTrainConv2d, TensorTrainLinear, TuckerConv2d


@dataclass(frozen=True, slots=True)
class Converted:
    """A layer that was converted.

    Attributes:
        name: Module path.
        ranks: Chosen.
        parameters_before: Of the weight.
        parameters: Of all factors.
        error: Norm of what the weight lost, over its own (Frobenius).
    """

    name: str
    ranks: tuple[int, ...]
    parameters_before: int
    parameters: int
    error: float

    @property
    def compression(self) -> float:
        """How many times fewer parameters."""
        return self.parameters_before / self.parameters


@torch.no_grad()
def tensorize(
    model: nn.Module,
    kind: TensorizeKind,
    *,
    error: float | None = None,
    compression: float | None = None,
    rank: int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Converted, ...]:
    """Replaces linear layers and convolutions of a model, in place, by products of small tensors.

    `low-rank` converts linear layers, `tucker` convolutions, `tensor-train` both. A layer that would not get smaller stays, and so does one
    whose weight another layer shares, unless it is named.

    Args:
        model: To be converted.
        kind: How.
        error: Largest relative error of each weight; ranks are the smallest that keep it.
        compression: How many times fewer parameters each layer shall have at least; ranks are the largest that give it, the same for
            all edges of a layer but for those that need less.
        rank: Of every edge, but for those that need less.
        names: Module paths; all that fit by default.

    Raises:
        InputError: None or several of the targets, one out of range, or an unknown name.
        UnsupportedError: A named layer that cannot be converted so (grouped convolutions, padding by name).
    """
    if kind not in KINDS:
        raise UnknownNameError("form of weights", kind, KINDS)
    _check_target(error, compression, rank)
    given = Tensorization(kind, rank or 0, compression or 0.0)
    modules = dict(model.named_modules())
    if unknown := [n for n in names or () if n not in modules]:
        raise InputError(f"{type(model).__name__} has no module {unknown[0]!r}")
    done = []
    for name in names if names is not None else _unshared(model):
        layer = modules[name]
        if not _convertible(layer, kind):
            if names is not None:
                raise UnsupportedError(f"{name} ({type(layer).__name__}) cannot be converted to {kind}")
            continue
        most = None if error is not None else _ranks(layer, given)
        if most == ():
            continue
        with torch.random.fork_rng(devices=[]):  # the first values of factors are overwritten: they must not cost random numbers
            made, ranks = _converted(layer, kind, error or 0.0, most)
        before = int(layer.weight.numel())
        after = sum(p.numel() for p in made.parameters()) - (layer.bias.numel() if layer.bias is not None else 0)
        if after >= before:
            continue
        lost = float((made.dense() - layer.weight).norm() / layer.weight.norm())
        path, _, last = name.rpartition(".")
        setattr(modules[path], last, made)
        done.append(Converted(name, ranks, before, after, lost))
    return tuple(done)


def tensorize_blocks(model: nn.Module, blocks: Sequence[str], form: Tensorization) -> tuple[Converted, ...]:
    """Converts the layers inside some modules, in place, as a strategy says it.

    Args:
        model: To be converted.
        blocks: Module paths.
        form: Of the weights.
    """
    inside = [name for name in _unshared(model) if any(name == b or name.startswith(f"{b}.") for b in blocks)]
    names = [name for name in inside if _convertible(model.get_submodule(name), form.kind)]
    return tensorize(model, form.kind, compression=form.compression or None, rank=form.rank or None, names=names)


def _check_target(error: float | None, compression: float | None, rank: int | None) -> None:
    if sum(target is not None for target in (error, compression, rank)) != 1:
        raise InputError("give one of error= (relative, such as 0.1), compression= (such as 4) and rank= (such as 16)")
    if error is not None and not 0 <= error < 1:
        raise InputError(f"error must lie in [0, 1), not {error}")
    if compression is not None and not (1 <= compression < math.inf):
        raise InputError(f"compression must be at least 1, not {compression}")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise InputError(f"rank must be a whole number of at least 1, not {rank!r}")


def _unshared(model: nn.Module) -> list[str]:
    """Module paths whose parameters no other path reaches."""
    paths = Counter(id(p) for module in _modules(model).values() for p in module.parameters(recurse=False))
    return [name for name, module in _modules(model).items() if all(paths[id(p)] == 1 for p in module.parameters(recurse=False))]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _convertible(layer: nn.Module, kind: TensorizeKind) -> bool:
    if isinstance(layer, nn.Linear):
        return kind in ("low-rank", "tensor-train")
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and kind in ("tucker", "tensor-train")


def _ranks(layer: nn.Module, form: Tensorization) -> tuple[int, ...]:
    """The ranks that a form gives a layer; empty where it stays as it is."""
    if isinstance(layer, nn.Conv2d):
        return form.filter_ranks(layer.in_channels, layer.out_channels, *layer.kernel_size)
    if form.kind == "tensor-train":
        plan = form.matrix_train(layer.in_features, layer.out_features)  # type: ignore[arg-type]
        return plan.ranks if plan else ()
    return form.matrix_ranks(layer.in_features, layer.out_features)  # type: ignore[arg-type]


def _converted(layer: nn.Module, kind: TensorizeKind, error: float, most: tuple[int, ...] | None) -> tuple[Any, tuple[int, ...]]:
    """The converted layer, with ranks for an error, or those given."""
    if isinstance(layer, nn.Conv2d):
        return _tucker(layer, error, most) if kind == "tucker" else _train_of_filter(layer, error, most)
    return _low_rank(layer, error, most) if kind == "low-rank" else _train_of_matrix(layer, error, most)  # type: ignore[arg-type]


def _cut(matrix: Tensor, lost: float, most: int | None) -> tuple[Tensor, Tensor]:
    """Factors of a matrix, `a @ b`, of the smallest rank that loses at most so much (in norm), or of the rank given, if it has so much.

    `a` has orthonormal columns.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = max(int((tails > lost * (1 + 1e-6)).sum()), 1) if most is None else min(most, len(s))
    return u[:, :rank], s[:rank, None] * v[:rank]


def _low_rank(layer: nn.Linear, error: float, most: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    u, v = _cut(layer.weight, error * float(layer.weight.norm()), most[0] if most else None)
    made = LowRankLinear(layer.in_features, layer.out_features, v.shape[0], bias=layer.bias is not None)
    _fill((made.u.weight, u), (made.v.weight, v), (made.u.bias, layer.bias))
    return made, (v.shape[0],)


def _tucker(layer: nn.Conv2d, error: float, most: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    weight = layer.weight
    lost = error * float(weight.norm()) / math.sqrt(2)  # squares of the two losses add up to at most the square of the error
    out, _ = _cut(weight.flatten(1), lost, most[1] if most else None)
    into, _ = _cut(weight.transpose(0, 1).flatten(1), lost, most[0] if most else None)
    made = TuckerConv2d(layer, (into.shape[1], out.shape[1]))
    core = torch.einsum("oikl,op,ij->pjkl", weight, out, into)
    _fill((made.narrow.weight, into.T[:, :, None, None]), (made.core.weight, core), (made.widen.weight, out[:, :, None, None]))
    _fill((made.widen.bias, layer.bias))
    return made, (into.shape[1], out.shape[1])


def _train_of_filter(layer: nn.Conv2d, error: float, most: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    cores = _train(layer.weight.permute(1, 2, 3, 0), error, most)
    ranks = tuple(core.shape[-1] for core in cores[:-1])
    made = TensorTrainConv2d(layer, ranks)  # type: ignore[arg-type]
    first, rows, columns, last = cores
    _fill((made.narrow.weight, first[0].T[:, :, None, None]), (made.rows.weight, rows.permute(2, 0, 1)[..., None]))
    _fill((made.columns.weight, columns.permute(2, 0, 1)[:, :, None]), (made.widen.weight, last[..., 0].T[:, :, None, None]))
    _fill((made.widen.bias, layer.bias))
    return made, ranks


def _train_of_matrix(layer: nn.Linear, error: float, most: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    inner, outer = factors(layer.in_features), factors(layer.out_features)
    whole = layer.weight.T.reshape(*inner, *outer)
    pairs = whole.permute(*(k for i in range(len(inner)) for k in (i, len(inner) + i)))
    cores = _train(pairs.reshape(*(a * b for a, b in zip(inner, outer, strict=True))), error, most)
    ranks = tuple(core.shape[-1] for core in cores[:-1])
    made = TensorTrainLinear(inner, outer, ranks, bias=layer.bias is not None)
    for parameter, core, a, b in zip(made.cores, cores, inner, outer, strict=True):
        _fill((parameter, core.reshape(core.shape[0], a, b, core.shape[2])))
    _fill((made.bias, layer.bias))
    return made, ranks


def _train(tensor: Tensor, error: float, most: tuple[int, ...] | None) -> list[Tensor]:
    """Cores of a tensor, by one truncation after the other; squares of their losses add up to at most the square of the error."""
    lost = error * float(tensor.norm()) / math.sqrt(max(tensor.ndim - 1, 1))
    cores, rest, rank = [], tensor, 1
    for edge, extent in enumerate(tensor.shape[:-1]):
        a, b = _cut(rest.reshape(rank * extent, -1), lost, most[edge] if most else None)
        cores.append(a.reshape(rank, extent, -1))
        rest, rank = b, b.shape[0]
    return [*cores, rest.reshape(rank, tensor.shape[-1], 1)]


def _fill(*pairs: tuple[Any, Any]) -> None:
    for parameter, values in pairs:
        if parameter is not None and values is not None:
            parameter.data.copy_(values)


__all__ = ["Converted", "tensorize", "tensorize_blocks"]
