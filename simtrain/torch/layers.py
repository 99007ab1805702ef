"""Puts written operators together as layers, and equal layers in a row into one that repeats."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from simtrain.core.polynomial import ONE
from simtrain.core.precision import DTypeRole
from simtrain.core.workload import Layer, Operator, Parameter
from simtrain.torch.experts import expert_parameters
from simtrain.torch.unfused import with_unfused
from simtrain.torch.writer import Entry, Writer


def layers_of(writer: Writer, module: nn.Module) -> tuple[Layer, ...]:
    """Returns the layers of a captured program, in forward order.

    Args:
        writer: With its lists written.
        module: For the order of parameters, and buffers.
    """
    names = _layer_names(writer)
    experts = expert_parameters(writer.program.base)
    single = [_layer(writer, module, layer, names, experts) for layer in range(writer.program.chain.depth)]
    merged: list[Layer] = []
    for layer in single:
        if merged and _plain(layer) == _plain(merged[-1]):
            before = merged[-1]
            name = _container(before.name) if before.repeats == 1 else before.name
            merged[-1] = replace(layer, name=name, repeats=before.repeats + 1)
        else:
            merged.append(layer)
    return tuple(merged)


def _plain(layer: Layer) -> Layer:
    """A layer without its name, and without how long backward holds its input, which the layer before decides."""

    def free(op: Operator) -> Operator:
        held = "x" in op.partial and not op.touched.terms
        return replace(op, reads=tuple(r for r in op.reads if r != "x"), partial=tuple(p for p in op.partial if p != "x")) if held else op

    return replace(layer, name="", repeats=1, backward=tuple(free(op) for op in layer.backward))


def _layer(writer: Writer, module: nn.Module, layer: int, names: list[str], experts: frozenset[str]) -> Layer:
    program = writer.program
    lists = [tuple(_held(e) for e in writer.entries if e.layer == layer and e.backward is side) for side in (False, True)]
    forward, backward = with_unfused(*lists)
    parameters = []
    for name, parameter in module.named_parameters():
        if name in writer.parameters[layer]:
            owner = writer.owner(name)
            tied = None if owner == layer else f"{names[owner]}.{writer.local(name, owner)}"
            trained = name in program.base.gradients
            parameters.append(Parameter(writer.local(name, layer), tuple(parameter.shape), tied, name in experts, trained))
    last = layer == program.last_layer
    crossing = program.base.loss if last else program.chain.activations[layer]
    return Layer(
        names[layer],
        forward,
        backward,
        tuple(sorted(parameters, key=lambda p: p.tied_to is not None)),
        ONE if last else program.elements(crossing),
        DTypeRole.HIGH if last else program.roles[crossing],
        safe_to_recompute=not any(u.startswith("input:") for op in forward for u in op.updates),
        inputs=tuple(writer.inputs[layer].values()),
        buffer_bytes=_buffer_bytes(writer, module, layer),
        block=writer.roots[layer].rsplit(".", 1)[-1].isdigit(),
    )


def _buffer_bytes(writer: Writer, module: nn.Module, layer: int) -> int:
    """Bytes of a layer's buffers and of parameters that nothing reads; the first layer has those of no layer or of several."""
    read = {name for parameters in writer.parameters for name in parameters}
    unread = [(n, p) for n, p in module.named_parameters() if n not in read]
    held: dict[int, tuple[Tensor, set[int]]] = {}
    for name, tensor in (*module.named_buffers(remove_duplicate=False), *unread):
        homes = [k for k, root in enumerate(writer.roots) if root and name.startswith(f"{root}.")]
        held.setdefault(id(tensor), (tensor, set()))[1].add(max(homes, key=lambda k: len(writer.roots[k])) if homes else 0)
    own = [tensor for tensor, homes in held.values() if layer == (homes.pop() if len(homes) == 1 else 0)]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def _container(name: str) -> str:
    """`blocks.0` is one of `blocks`."""
    path, _, last = name.rpartition(".")
    return path if path and last.isdecimal() else name


def _held(entry: Entry) -> Operator:
    holds = tuple(n for n in dict.fromkeys(entry.holds) if n not in entry.operator.reads)
    return replace(entry.operator, reads=entry.operator.reads + holds, partial=entry.operator.partial + holds)


def _layer_names(writer: Writer) -> list[str]:
    names: list[str] = []
    for layer, root in enumerate(writer.roots):
        name = root or ("before" if layer == 0 else "after" if layer == writer.program.last_layer else "between")
        names.append(name if name not in names else f"{name}#{layer}")
    return names
