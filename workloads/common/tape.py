"""Writes the two operator lists of a layer the way autograd runs them.

A piece of a model (`workloads.common.pieces`) states its forward operators and, beside them, the node that autograd would run for them.
Nodes run in reverse order; gradients of a tensor with several readers are added as they arrive. Two rules of PyTorch decide lifetimes:

* A node keeps what it reads (its saved tensors and incoming gradients) until its last operator is done.
* A Python frame keeps what its names hold.

Where such a keeper outlives the last real reader, a later operator *holds* the tensor: it names it in `reads` and in `partial`, with
nothing of it `touched`, so that it lives on but costs no bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from simtrain.core.polynomial import Polynomial, as_polynomial
from simtrain.core.precision import DTypeRole
from simtrain.core.tensorize import Tensorization
from simtrain.core.workload import Layer, Operator, OperatorKind, Parameter, Tensor, TensorKind

Node = Callable[[], None]


class Tape:
    """Collects a layer.

    Args:
        given: Tensors that come from outside (the layer's input, the batch).
        tensorized: The form of the layer's weights; `None` where they are whole.
    """

    def __init__(self, *given: Tensor, tensorized: Tensorization | None = None) -> None:
        self.tensorized = tensorized
        self.tensors: dict[str, Tensor] = {t.name: t for t in given}
        self.parameters: list[Parameter] = []
        self._forward: list[Operator] = []
        self._backward: list[Operator] = []
        self._nodes: list[Node] = []
        self._gradients: dict[str, str] = {}
        self._arrivals: dict[str, int] = {}
        self._targets: dict[str, str] = {}
        self._inputs = tuple(t for t in given if t.name.startswith("input:"))
        self._buffer_bytes = 0

    def parameter(self, name: str, *shape: int, tied_to: str | None = None, gradient: str | None = None, expert: bool = False) -> str:
        """Registers a parameter and returns its name.

        Args:
            name: As in the module.
            shape: As in the module.
            tied_to: `layer.parameter` whose storage it shares.
            gradient: Name of its gradient where that is not `grad:<name>`.
            expert: Whether it belongs to experts.
        """
        parameter = Parameter(name, shape, tied_to, expert)
        self.parameters.append(parameter)
        self.tensors[name] = Tensor(name, as_polynomial(parameter.elements), DTypeRole.PARAMETER)
        self._targets[name] = gradient or f"grad:{name}"
        return name

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within it weights are not tensorized (the factors of one that is)."""
        kept, self.tensorized = self.tensorized, None
        try:
            yield
        finally:
            self.tensorized = kept

    def buffer(self, size_bytes: int) -> None:
        """Counts what a layer stores beside its parameters (running statistics)."""
        self._buffer_bytes += size_bytes

    def run(self, operator: Operator, *, holds: Iterable[str] = ()) -> None:
        """Appends a forward operator."""
        self._forward.append(hold(operator, holds))
        self.tensors.update({t.name: t for t in operator.writes})

    def node(self, node: Node) -> None:
        """Registers what autograd runs for the operators just appended."""
        self._nodes.append(node)

    def run_backward(self, *operators: Operator) -> None:
        """Appends the operators of one autograd node; the last one holds what the others read."""
        *first, last = operators
        read = dict.fromkeys(name for op in first for name in op.reads)
        kept = [n for n in read if n not in self._targets]
        self._backward += [*first, hold(last, kept)]

    def gradient(self, name: str) -> str:
        """Returns the name of the gradient that arrived for a tensor."""
        return self._gradients[name]

    def take(self, name: str) -> str:
        """Returns the gradient that arrived for a tensor after it was overwritten in place; the next one is that of its old value."""
        return self._gradients.pop(name)

    def gradient_tensor(self, name: str) -> Tensor:
        """Describes a new (partial) gradient of a tensor or parameter."""
        like = self.tensors[name]
        if name in self._targets:
            return Tensor(self._targets[name], like.elements, DTypeRole.GRADIENT, TensorKind.GRADIENT)
        if like.kind is TensorKind.CAST:
            return Tensor(f"grad:{name}", like.elements, like.role, TensorKind.GRADIENT)
        arrived = self._arrivals.get(name, 0)
        label = f"d{name}" if not arrived else f"d{name}.more{arrived}"
        return Tensor(label, like.elements, like.role, like.kind)

    def give(self, name: str, gradient: str) -> None:
        """Hands a gradient to a tensor; a second one is added to the first, which allocates a third."""
        self._arrivals[name] = self._arrivals.get(name, 0) + 1
        if name not in self._gradients:
            self._gradients[name] = gradient
            return
        total = replace(self.gradient_tensor(name), name=f"d{name}.sum{self._arrivals[name]}")
        reads = (self._gradients[name], gradient)
        self._backward.append(Operator(f"{total.name}.add", OperatorKind.ELEMENTWISE, reads=reads, writes=(total,)))
        self._gradients[name] = total.name

    def cast(self, name: str, role: DTypeRole, *, holds: Iterable[str] = (), cached: bool = True) -> str:
        """Converts a tensor to the number format of a role, unless it already has that role; returns the new name.

        Args:
            name: Of the tensor.
            role: Wanted.
            holds: Tensors that Python names keep alive meanwhile.
            cached: Whether autocast keeps it if it is of a parameter (not if it is of a view).
        """
        source = self.tensors[name]
        if source.role is role:
            return name
        kind = TensorKind.CAST if cached and name in self._targets else source.kind
        target = Tensor(self._fresh(f"{name}.{role.value}"), source.elements, role, kind)
        self.run(Operator(f"{target.name}.cast", OperatorKind.CAST, reads=(name,), writes=(target,)), holds=holds)
        if name.startswith("input:"):
            return target.name

        def node() -> None:
            written = self.gradient_tensor(name)
            self._backward.append(
                Operator(f"{target.name}.cast.backward", OperatorKind.CAST, reads=(self.gradient(target.name),), writes=(written,))
            )
            self.give(name, written.name)

        self.node(node)
        return target.name

    def _fresh(self, name: str) -> str:
        """Returns the name, with a number where it is taken (three projections each cast their common input)."""
        number = sum(t == name or t.startswith(f"{name}#") for t in self.tensors)
        return f"{name}#{number + 1}" if number else name

    def layer(
        self,
        name: str,
        *,
        out: str,
        cut: Polynomial,
        cut_role: DTypeRole = DTypeRole.HIGH,
        repeats: int = 1,
        inputs: bool = True,
        seed: str = "dy",
        safe_to_recompute: bool = True,
        block: bool = False,
    ) -> Layer:
        """Runs the nodes in reverse and returns the layer.

        Args:
            name: Of the layer.
            out: What it hands on; named `y` in the lists.
            cut: Elements handed to the next layer.
            cut_role: Their number format.
            repeats: Equal layers in a row.
            inputs: Whether the layer's input `x` gets a gradient `dx`.
            seed: Name of the gradient of its output.
            safe_to_recompute: Whether the forward pass may run twice.
            block: Whether it is one of the blocks that the model stacks.
        """
        forward, backward = self.finish(out, seed)
        names = {out: "y"}
        if inputs and (last := self._gradients["x"]) != "dx":
            names |= {"dx": "dx.part", last: "dx"}
        forward, backward = (tuple(rename(op, names) for op in ops) for ops in (forward, backward))
        return Layer(
            name,
            forward,
            backward,
            tuple(self.parameters),
            cut,
            cut_role,
            repeats,
            safe_to_recompute,
            inputs=self._inputs,
            buffer_bytes=self._buffer_bytes,
            block=block,
        )

    def finish(self, out: str, seed: str) -> tuple[tuple[Operator, ...], tuple[Operator, ...]]:
        """Runs the nodes in reverse and returns both operator lists.

        Args:
            out: Name of the result.
            seed: Name of its gradient.
        """
        self._gradients[out] = seed
        for node in reversed(self._nodes):
            node()
        return tuple(self._forward), tuple(self._backward)


def hold(operator: Operator, names: Iterable[str]) -> Operator:
    """Returns the operator with further reads that keep tensors alive without moving bytes."""
    kept = tuple(n for n in dict.fromkeys(names) if n not in operator.reads)
    return replace(operator, reads=operator.reads + kept, partial=operator.partial + kept)


def rename(operator: Operator, names: dict[str, str]) -> Operator:
    """Renames the tensors of an operator."""
    return replace(
        operator,
        reads=tuple(names.get(n, n) for n in operator.reads),
        updates=tuple(names.get(n, n) for n in operator.updates),
        partial=tuple(names.get(n, n) for n in operator.partial),
        writes=tuple(replace(t, name=names.get(t.name, t.name)) for t in operator.writes),
        unfused=tuple(rename(op, names) for op in operator.unfused),
    )
