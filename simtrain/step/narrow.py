"""Linear layers in fewer bits: narrow copies of operands made where products need them, gathered and saved in place of wide ones.

Of each linear layer inside a block three products run on narrow copies: the output reads input and weight by rows, the gradient of the
input reads the output's gradient by rows and the weight by columns, the gradient of the weight reads both its operands by columns.
The grouped products of experts do so too; their operands are cast expert by expert, with a scale for each, in one call of the library
(the host's time is that of one kernel). Attention, norms, routers, embedding and head stay as they are. Where sequence parallelism
gathers an operand, its narrow copy travels.

Copies of weights are made once a step and kept. Fully sharded weights are not there between passes: each pass makes its copies of what
was gathered for it, or finds the copy by rows there because that is what was gathered, and transposes it where backward needs that.

Sources: Transformer Engine's documentation, features/low_precision_training/performance_considerations (usages by rows and columns,
transposes on Hopper, what is saved); gathers of narrow copies and norms that write them: transformer_engine/pytorch/module (recalled).
Fully sharded weights: pytorch/torchtitan, docs/float8.md (`enable_fsdp_float8_all_gather`: cast before the gather;
`force_recompute_fp8_weight_in_bwd`: copies are not kept for backward) and pytorch/ao, torchao/float8/float8_linear.py (what a product
casts). Casts expert by expert: transformer_engine/pytorch/module/grouped_linear.py (recalled).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from simtrain.core.polynomial import as_polynomial
from simtrain.core.precision import DTypeRole, Precision, Quantization
from simtrain.core.workload import Collective, Layer, Operator, OperatorKind, Parameter, Role, Tensor
from simtrain.step.selective import AGAIN
from simtrain.step.specialize import PRODUCTS, ConcreteLayer, concrete_layer

ROWS, COLUMNS = "rows", "columns"


def narrowed_layers(layers: Sequence[ConcreteLayer]) -> tuple[ConcreteLayer, ...]:
    """Returns layers with what the recipe quantizes on narrow operands."""
    return tuple(map(narrowed, layers))


@lru_cache(maxsize=512)
def narrowed(concrete: ConcreteLayer) -> ConcreteLayer:
    """Returns a layer with its linear layers on narrow operands; as it is where the recipe has none or it is no block."""
    form = concrete.precision.narrow
    if form is None or not concrete.layer.block:
        return concrete
    weights = narrow_weights(concrete)
    if not weights:
        return concrete
    return _Narrowing(concrete, form, weights).layer()


def narrow_weights(concrete: ConcreteLayer) -> tuple[str, ...]:
    """Names of the matrices of linear layers: parameters that a forward product reads beside an activation."""
    matrices = {p.name for p in concrete.layer.parameters if is_matrix(p) and p.trained}
    read = [_weight(op, matrices) for op in concrete.forward if op.kind in PRODUCTS]
    return tuple(dict.fromkeys(name for name in read if name))


def is_matrix(parameter: Parameter) -> bool:
    """Whether a parameter is a matrix, or one matrix per expert."""
    return len(parameter.shape) == 2 + parameter.expert


def narrow_saving_bytes(layer: Layer, precision: Precision) -> float:
    """Bytes that the gather of a fully sharded layer saves because its matrices travel narrow; routers count as such."""
    form = precision.narrow
    if form is None or form.sharded != "narrow" or not layer.block:
        return 0.0
    saved = precision.parameter.size_bytes - form.bytes_per_element
    return saved * sum(p.elements for p in layer.trained if is_matrix(p))


def _weight(op: Operator, matrices: set[str]) -> str:
    if op.dims[2].role is Role.EXPERTS:
        return ""  # a router, which stays wide
    return next((name for name in op.reads[1:] if name in matrices and name not in op.partial), "")


class _Narrowing:
    """Rewrites both passes of a layer."""

    def __init__(self, concrete: ConcreteLayer, form: Quantization, weights: tuple[str, ...]) -> None:
        self.concrete, self.form, self.weights = concrete, form, set(weights)
        held = {p.name: as_polynomial(p.elements) for p in concrete.layer.parameters if p.name in self.weights}
        crossing = {"x": concrete.before.cut, "dx": concrete.before.cut, "y": concrete.layer.cut, "dy": concrete.layer.cut}
        self.sizes = crossing | {name: tensor.elements for name, tensor in concrete.tensors.items()} | held
        self.forward = True
        self.given = {True: self._given(forward=True), False: self._given(forward=False)}
        self.made: set[str] = set()
        # inputs that the gradient of a weight reads as the forward pass left them: their copy by columns is made in that pass
        gathered = {op.writes[0].name: op.reads[0] for op in concrete.backward if _gathers(op)}
        wanted = [op.reads[1] for op in concrete.backward if self._makes_weight_gradient(op)]
        self.early = {name for name in wanted if name not in gathered}
        self.early |= {gathered[name] for name in wanted if name in gathered and form.block}
        # where cheap operators are made again, so are casts
        self.again = any(op.kind in (OperatorKind.NORM, OperatorKind.GEMM) and op.name.endswith(AGAIN) for op in concrete.backward)
        self.early = set() if self.again else self.early
        self.gone = set(weights) if form.sharded else set()

    def layer(self) -> ConcreteLayer:
        """The layer with both passes rewritten."""
        concrete = self.concrete
        forward, backward = self._pass(concrete.forward, forward=True), self._pass(concrete.backward, forward=False)
        layer = concrete_layer(concrete.layer, forward, backward, concrete.precision, concrete.before)
        tensors = concrete.tensors | layer.tensors | self.given[True] | self.given[False]
        return replace(layer, tensors=tensors, narrow_weights=tuple(sorted(self.weights)), summed_into=concrete.summed_into)

    def _given(self, *, forward: bool) -> dict[str, Tensor]:
        """Copies of weights that are there when a pass begins."""
        there = {"": (ROWS, COLUMNS), "wide": (), "narrow": (ROWS,) if forward or not self.form.block else (COLUMNS,)}
        copies = [self._named(name, use) for name in self.weights for use in there[self.form.sharded]]
        return {tensor.name: tensor for tensor in copies}

    def _named(self, name: str, use: str, behind: str = "") -> Tensor:
        elements = self.sizes[name] * (self.form.bytes_per_element / self.form.dtype.size_bytes)
        return Tensor(f"{name}:{use if self.form.two_copies else ROWS}{behind}", elements, DTypeRole.NARROW)

    def _copy(self, name: str, use: str) -> Tensor:
        """A narrow copy; where that of the forward pass was let go, backward makes its own."""
        tensor = self._named(name, use)
        own = not self.forward and name in self.gone and tensor.name not in self.given[False]
        return self._named(name, use, AGAIN) if own else tensor

    def _makes_weight_gradient(self, op: Operator) -> bool:
        return op.kind in PRODUCTS and any(w.name.removeprefix("grad:") in self.weights for w in op.writes)

    def _uses(self, op: Operator, *, forward: bool) -> dict[str, str]:
        """Operands of a product of a linear layer and how each is read; empty for any other operator."""
        if op.kind not in PRODUCTS:
            return {}
        if self._makes_weight_gradient(op):
            return {op.reads[0]: COLUMNS, op.reads[1]: COLUMNS}
        weight = _weight(op, self.weights)
        by_rows = forward or op.name.endswith(AGAIN)  # a forward product that backward makes once more
        return {op.reads[0]: ROWS, weight: ROWS if by_rows else COLUMNS} if weight else {}

    def _pass(self, operators: tuple[Operator, ...], *, forward: bool) -> tuple[Operator, ...]:
        self.forward = forward
        self.made |= self.given[forward].keys()
        needs: dict[str, set[str]] = {}
        wide: set[str] = set()
        for op in operators:
            found = self._uses(op, forward=forward)
            for name, use in found.items():
                needs.setdefault(name, set()).add(use)
            wide |= {n for n in (*op.reads, *op.updates) if n not in found and n not in op.partial and not _gathers(op)}
        for name in needs.keys() & self.early if forward else ():
            needs[name].add(COLUMNS)
        out: list[Operator] = []
        for op in operators:
            found = self._uses(op, forward=forward)
            if _gathers(op) and op.writes[0].name in needs.keys() - wide:
                self._gather(op, needs[op.writes[0].name], out)
            elif found:
                names = {name: self._operand(name, use, needs[name], out) for name, use in found.items()}
                out.append(_renamed(op, names))
            elif self._writes_narrow(op, needs.keys() - wide, operators, forward=forward):
                out.append(replace(op, writes=(self._made(op.writes[0].name, ROWS), *op.writes[1:])))
            else:
                out.append(op)
        # what is merely kept alive of an operand is its narrow copy
        return tuple(self._held(op, out) for op in out)

    def _made(self, name: str, use: str) -> Tensor:
        tensor = self._copy(name, use)
        self.made.add(tensor.name)
        if self.again and self.forward:
            self.gone.add(name)
        return tensor

    def _operand(self, name: str, use: str, needed: set[str], out: list[Operator]) -> str:
        """Name of a narrow copy; what makes it is appended to `out` if it is not there yet."""
        wanted, other = self._copy(name, use), self._copy(name, ROWS if use == COLUMNS else COLUMNS)
        if wanted.name not in self.made and other.name in self.made and not self.form.block:
            out.append(Operator(f"{wanted.name}.transpose", OperatorKind.COPY, (other.name,), (self._made(name, use),)))
        elif wanted.name not in self.made:
            self._quantize(name, needed | {use}, out)
        return wanted.name

    def _quantize(self, name: str, uses: set[str], out: list[Operator]) -> None:
        """One kernel that writes all copies that are needed, behind one that finds the largest magnitude where scales need that."""
        if self.form.amax_first:
            out.append(Operator(f"{name}.amax", OperatorKind.REDUCTION, (name,)))
        copies = {tensor.name: tensor for tensor in (self._made(name, use) for use in sorted(uses, reverse=True))}
        out.append(Operator(f"{name}.quantize", OperatorKind.COPY, (name,), tuple(copies.values())))

    def _gather(self, op: Operator, needed: set[str], out: list[Operator]) -> None:
        """Gathers the narrow copies instead; a transposed one is made of what arrives, scales along columns travel with their own."""
        source, whole = op.reads[0], op.writes[0].name
        for use in sorted(needed if self.form.block else {ROWS}, reverse=True):
            early = {COLUMNS} if source in self.early else set()
            read = self._operand(source, use, (needed if self.form.block else {ROWS}) | early, out)
            written = self._made(whole, use)
            out.append(replace(op, name=f"{written.name}.all_gather", reads=(read,), writes=(written,), partial=()))

    def _writes_narrow(self, op: Operator, only_narrow: set[str], operators: tuple[Operator, ...], *, forward: bool) -> bool:
        """Whether the kernel of a norm writes the copy that products or a gather read, and nothing else reads its result."""
        if not (forward and self.form.in_norm and op.kind is OperatorKind.NORM):
            return False
        name = op.writes[0].name
        readers = [o for o in (*operators, *self.concrete.backward) if name in o.reads and name not in o.partial]
        gathers = {o.writes[0].name for o in operators if _gathers(o) and o.reads[0] == name} | {name}
        own = all(_gathers(o) or name in self._uses(o, forward=o in operators) for o in readers)
        return bool(readers) and own and bool(gathers & only_narrow)

    def _held(self, op: Operator, out: list[Operator]) -> Operator:
        written = {w.name for o in out for w in o.writes}
        held = [n for n in op.partial if n not in written and n in self.sizes and n not in self.weights]
        copies = [(n, self._copy(n, use).name) for n in held for use in (ROWS, COLUMNS)]
        names = {n: copy for n, copy in copies if copy in self.made}
        return _renamed(op, names) if names else op


def _gathers(op: Operator) -> bool:
    return op.collective is Collective.ALL_GATHER and bool(op.writes)


def _renamed(op: Operator, names: dict[str, str]) -> Operator:
    reads = tuple(dict.fromkeys(names.get(n, n) for n in op.reads))
    return replace(op, reads=reads, partial=tuple(names.get(n, n) for n in op.partial))


__all__ = ["is_matrix", "narrow_saving_bytes", "narrow_weights", "narrowed", "narrowed_layers"]
