"""Replays operator lists: which tensors each operator allocates, and how many bytes are alive while it runs."""

from dataclasses import dataclass

from simtrain.core.precision import Precision
from simtrain.core.workload import Layer, Operator, OperatorKind, Workload

EXTERNAL = -1


@dataclass(frozen=True)
class Moment:
    name: str
    allocated: tuple[int, ...]
    live: int


def unfuse(operators: tuple[Operator, ...]) -> tuple[Operator, ...]:
    """Puts the replacement of every fused operator in its place."""
    return tuple(inner for op in operators for inner in (op.unfused or (op,)))


class Replay:
    """A forward and a backward pass of a workload as one list of operators over global tensor names.

    Args:
        workload: What runs.
        batch: Samples.
        precision: Number formats.
        unfused: Whether attention is written out.
    """

    def __init__(self, workload: Workload, batch: int, precision: Precision, *, unfused: bool = False) -> None:
        self.workload, self.batch, self.precision = workload, batch, precision
        self.layers: list[Layer] = list(workload)
        self.bytes: dict[str, int] = {}
        self.same: dict[str, str] = {}
        self.program: list[tuple[str, list[str], list[str], bool]] = []
        change = unfuse if unfused else tuple
        for backward in (False, True):
            for index in reversed(range(len(self.layers))) if backward else range(len(self.layers)):
                layer = self.layers[index]
                for op in change(layer.backward if backward else layer.forward):
                    self._add(index, op, backward)

    def _add(self, index: int, op: Operator, backward: bool) -> None:
        reads = [self._root(self._name(index, n)) for n in (*op.reads, *op.updates)]
        writes = []
        for tensor in op.writes:
            name = self._name(index, tensor.name)
            size = round(tensor.elements(self.batch, self.workload.sequence)) * self.precision.dtype(tensor.role).size_bytes
            if op.kind is OperatorKind.CAST and self._width(index, op.reads[0]) == self.precision.dtype(tensor.role).size_bytes:
                self.same[name] = reads[0]
                continue
            assert name not in self.bytes, f"{name} is written twice"
            self.bytes[name] = size
            writes.append(name)
        for name in reads:
            assert name in self.bytes or self._external(name), f"{op.name} reads {name}, which nobody wrote"
        self.program.append((op.name, reads, writes, backward))

    def _name(self, index: int, name: str) -> str:
        if name.startswith(("input:", "shared:")):
            return name
        if name == "x" and index:
            index, name = index - 1, "y"
        if name == "dy":
            index, name = index + 1, "dx"
        return f"{index}/{name}"

    def _root(self, name: str) -> str:
        return self.same.get(name, name)

    def _external(self, name: str) -> bool:
        if name.startswith("input:"):
            return True
        index, _, local = name.partition("/")
        return local in {p.name for p in self.layers[int(index)].parameters}

    def _width(self, index: int, name: str) -> int:
        layer = self.layers[index]
        operators = [inner for op in layer.forward + layer.backward for inner in (op, *op.unfused)]
        tensors = {t.name: t for t in layer.inputs} | {t.name: t for op in operators for t in op.writes}
        if name in {p.name for p in layer.parameters}:
            return self.precision.parameter.size_bytes
        if name in ("x", "dy"):
            role = self.layers[index - 1].cut_role if name == "x" else layer.cut_role
            return self.precision.dtype(role).size_bytes
        return self.precision.dtype(tensors[name].role).size_bytes

    def moments(self) -> list[Moment]:
        """Returns what every allocating operator allocates, and the bytes alive when it is done.

        Three rules beyond last reader: gradients of parameters and the loss stay; so does the gradient of the loss, which the call of
        `backward` holds; autocast keeps its casts of parameters until its context ends with the forward pass.
        """
        last = {name: step for step, (_, reads, writes, _) in enumerate(self.program) for name in (*reads, *writes)}
        forward_end = sum(not backward for *_, backward in self.program) - 1
        last |= {n: max(step, forward_end) for n, step in last.items() if n.endswith((".weight.low", ".bias.low")) and "grad:" not in n}
        kept = {self._root(n) for n in (*self.bytes, *self.same) if "/grad:" in n and not n.endswith(".low")}
        kept |= {f"{len(self.layers) - 1}/{n}" for n in ("y", "dloss")}
        live: dict[str, int] = {}
        found = []
        for step, (name, reads, writes, _) in enumerate(self.program):
            live |= {n: self.bytes[n] for n in writes}
            if writes:
                found.append(Moment(name, tuple(self.bytes[n] for n in writes), sum(live.values())))
            gone = {*reads, *writes} if step != forward_end else set(live)
            for n in gone:
                if n in live and last[n] <= step and n not in kept:
                    del live[n]
        return found

    def saved(self) -> list[int]:
        """Returns the sizes of the tensors that the forward pass leaves for the backward pass."""
        written = {n for _, _, writes, backward in self.program if not backward for n in writes}
        read = {n for _, reads, _, backward in self.program if backward for n in reads}
        return sorted(self.bytes[n] for n in written & read)
