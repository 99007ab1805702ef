"""A captured workload written for one tensor-parallel rank, by module name, as PyTorch's `parallelize_module` divides a module.

A plan says which modules are divided: "column" (outputs), "row" (inputs, partial results are all-reduced), "vocabulary" (rows of a
table, all-reduced), "gather" (outputs, gathered at once: heads whose logits the loss reads whole). Which tensors are divided follows
operator by operator; what cannot follow is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from simtrain.core.errors import InputError, StrategyError, UnsupportedError
from simtrain.core.polynomial import Polynomial
from simtrain.core.workload import Collective, Form, Layer, Operator, OperatorKind, Parameter, Tensor, Workload
from simtrain.torch.experts import one_after_another

Plan = Mapping[str, str]
WAYS = ("column", "row", "vocabulary", "gather")

KNOWN: Plan = {
    **dict.fromkeys(("*q_proj", "*k_proj", "*v_proj", "*gate_proj", "*up_proj", "*c_attn", "*c_fc"), "column"),
    **dict.fromkeys(("*self.query", "*self.key", "*self.value", "*intermediate.dense"), "column"),
    **dict.fromkeys(("*o_proj", "*down_proj", "*c_proj", "*output.dense"), "row"),
    **dict.fromkeys(("*embed_tokens", "*wte", "*word_embeddings"), "vocabulary"),
    **dict.fromkeys(("*lm_head", "*predictions.decoder", "*predictions"), "gather"),
}
"""Names that Hugging Face's models use: Llama and its kin, GPT-2, BERT."""

_PRODUCTS = (OperatorKind.GEMM, OperatorKind.BATCHED_GEMM)
_MOVED = (OperatorKind.ELEMENTWISE, OperatorKind.CAST, OperatorKind.COPY)


def check_plan(plan: Plan) -> None:
    """Refuses a plan with an unknown way to divide.

    Raises:
        InputError: Names the module.
    """
    for name, way in plan.items():
        if way not in WAYS:
            raise InputError(f"tensor_plan: {name!r} is to be divided by {' or '.join(WAYS)}, not {way!r}")


def divided(workload: Workload, plan: Plan, form: Form) -> Workload:
    """Writes a captured workload for one rank.

    Args:
        workload: The whole of it.
        plan: Way to divide by pattern of module names.
        form: One rank's part.

    Raises:
        StrategyError: A degree that does not divide a module.
        UnsupportedError: A form other than tensor parallelism, or an operator through which a division cannot be followed.
    """
    if form.tensorized:
        raise UnsupportedError(
            f"{workload.name} is captured, known by its operators alone, so that its weights cannot be written as {form.tensorized.kind}: "
            "convert the module by simtrain.torch.tensorize, then capture it"
        )
    if not form.grouped_experts:
        workload = one_after_another(workload)
    if form.tensor == form.context == form.expert == 1:
        return workload
    other = [n for n, asked in (("context", form.context > 1), ("expert", form.expert > 1), ("sequence", form.sequence_parallel)) if asked]
    if other:
        raise UnsupportedError(f"{workload.name} is captured: {' and '.join(other)} parallelism cannot divide it; tensor parallelism can")
    shared: dict[str, bool] = {}
    made = [_Divider(layer, plan, form.tensor, shared).layer() for layer in reversed(workload.layers)]
    if not any(p.elements != q.elements for a, b in zip(reversed(made), workload.layers, strict=True) for p, q in _pairs(a, b)):
        raise UnsupportedError(f"no module of {workload.name} is in its tensor plan: give tensor_plan to capture")
    return replace(workload, layers=tuple(reversed(made)))


def _pairs(one: Layer, other: Layer) -> list[tuple[Parameter, Parameter]]:
    return list(zip(one.parameters, other.parameters, strict=True))


class _Divider:
    """Follows the division through one layer.

    Args:
        whole: The layer.
        plan: Of the model.
        degree: Ranks.
        shared: Which tensors that cross layers are divided; completed here.
    """

    def __init__(self, whole: Layer, plan: Plan, degree: int, shared: dict[str, bool]) -> None:
        self.whole, self.plan, self.degree, self.shared = whole, plan, degree, shared
        self.parts: set[str] = {n for n, cut in shared.items() if cut}
        self.aliases: dict[str, str] = {}
        self.parameters = tuple(self._parameter(p) for p in whole.parameters)

    def layer(self) -> Layer:
        """Returns the layer as one rank runs it."""
        forward = [op for whole in self.whole.forward for op in self._operator(whole, backward=False)]
        backward = [op for whole in self.whole.backward for op in self._operator(whole, backward=True)]
        for name in ("y", "dx"):
            if name in self.parts:
                raise self._refusal(f"{name} leaves the layer divided: a column-parallel module lacks its row-parallel one")
        for parameter, before in zip(self.parameters, self.whole.parameters, strict=True):
            cut, gradient = parameter.elements != before.elements, f"grad:{before.name}"
            written = any(t.name == gradient for op in backward for t in op.writes)
            if written and cut != (gradient in self.parts):
                raise self._refusal(f"the gradient of {before.name} is not divided as the parameter is")
        return replace(self.whole, forward=tuple(forward), backward=tuple(backward), parameters=self.parameters)

    def _refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.whole.name} cannot be divided over {self.degree} tensor-parallel ranks: {why}")

    def _way(self, module: str) -> str:
        names = (module, f"{self.whole.name}.{module}", f"{self.whole.name}.0.{module}")
        return next((way for pattern, way in self.plan.items() if any(fnmatchcase(n, pattern) for n in names)), "")

    def _parameter(self, parameter: Parameter) -> Parameter:
        module, _, last = parameter.name.rpartition(".")
        way = self._way(module)
        if not way or (way == "row" and last == "bias"):
            return parameter
        bias = next((p.shape[0] for p in self.whole.parameters if p.name == f"{module}.bias"), None)
        transposed = last == "weight" and bias is not None and parameter.shape[0] != bias  # input side first, as in GPT-2
        side = int((way == "row") != transposed) if len(parameter.shape) > 1 else 0
        size = parameter.shape[side]
        if size % self.degree:
            near = max(d for d in range(1, self.degree) if size % d == 0)
            raise StrategyError(
                f"tensor={self.degree} does not divide {parameter.name} of {size}: the next degree below that does is {near}"
            )
        self.parts.add(parameter.name)
        return replace(parameter, shape=tuple(n // self.degree if i == side else n for i, n in enumerate(parameter.shape)))

    def _operator(self, whole: Operator, *, backward: bool) -> list[Operator]:
        reads, in_part = (tuple(self.aliases.get(n, n) for n in names) for names in (whole.reads, whole.partial))
        op = replace(whole, reads=reads, partial=in_part)
        module = op.name.rsplit(".", 2 if ".backward" in op.name else 1)[0]
        gathers = self._way(module) == "gather"
        before: list[Operator] = []
        if backward and gathers and op.kind is OperatorKind.GEMM and op.reads[0] not in self.parts:
            before, op = self._slice(op)
        if not backward and op.kind is OperatorKind.GEMM and op.reads[0] in self.parts and op.reads[1] not in self.parts:
            raise self._refusal(f"{op.name} gets a divided input but is not row-parallel")
        cut, partial = self._follow(op)
        if op.kind is OperatorKind.EMBEDDING_BACKWARD:
            cut = f"{module}.weight" in self.parts
        op = self._cut(op) if cut or partial else op
        if cut:
            self.parts.update(t.name for t in op.writes)
            self.shared.update({t.name: True for t in op.writes if t.name.startswith("shared:")})
        after = [self._reduce(op)] if partial else self._gather(whole) if gathers and cut and not backward and op.dims else []
        return [*before, op, *after]

    def _follow(self, op: Operator) -> tuple[bool, bool]:
        """Whether what an operator writes is divided, and whether it is a partial sum."""
        # what comes first is read, be it in part (a slice); what is partial behind it may only be held
        reads = [n for i, n in enumerate(op.reads) if not i or n not in op.partial]
        parts = [n for n in reads if n in self.parts]
        if op.kind is OperatorKind.EMBEDDING:
            return False, any(n in self.parts for n in op.reads)
        if op.kind in _PRODUCTS and not (op.kind is OperatorKind.BATCHED_GEMM and len(parts) == len(reads)):
            both = all(n in self.parts for n in reads[:2])
            return bool(parts) and not both, both
        if not parts:
            return False, False
        if op.kind in (OperatorKind.NORM, OperatorKind.SOFTMAX, OperatorKind.NORM_BACKWARD, OperatorKind.SOFTMAX_BACKWARD):
            self._check_rows(op)
        if op.kind is OperatorKind.ATTENTION and any(c % self.degree for _, _, c in op.dims[0].size.terms):
            raise StrategyError(f"tensor={self.degree} does not divide the heads of {self.whole.name}: {op.dims[0].size}")
        if op.kind in _MOVED and len(parts) < len(reads):
            self._check_mixed(op, [n for n in reads if n not in self.parts])
        return True, False

    def _check_rows(self, op: Operator) -> None:
        if not any(d.size.terms and all(c % self.degree == 0 and c > 1 for _, _, c in d.size.terms) for d in op.dims[:2]):
            raise self._refusal(f"{op.name} needs whole rows of a divided tensor")

    def _check_mixed(self, op: Operator, whole: list[str]) -> None:
        """Tables may be broadcast over a division; a whole activation beside a divided one may not."""
        known = {t.name: t for o in (*self.whole.forward, *self.whole.backward) for t in o.writes}
        for name in whole:
            if name in known and any(known[name].elements == t.elements for t in op.writes):
                raise self._refusal(f"{op.name} mixes {name}, which is whole, with divided tensors")

    def _share(self, size: Polynomial) -> Polynomial:
        return size * (1 / self.degree)

    def _cut(self, op: Operator) -> Operator:
        """One rank's part of an operator: outputs of products keep their size where they are partial sums."""
        if op.kind is OperatorKind.EMBEDDING:
            return op
        summed = op.kind in _PRODUCTS and all(n in self.parts for n in op.reads[:2]) and op.kind is OperatorKind.GEMM
        writes = op.writes if summed else tuple(replace(t, elements=self._share(t.elements)) for t in op.writes)
        dims, at = op.dims, 0
        if op.kind is OperatorKind.GEMM:
            at = 3 if summed else 1 if op.reads[0] in self.parts else 2
        elif dims and op.kind not in (OperatorKind.ATTENTION, OperatorKind.ATTENTION_BACKWARD, OperatorKind.BATCHED_GEMM):
            at = 1
        if dims:
            dims = tuple(replace(d, size=self._share(d.size)) if i == at else d for i, d in enumerate(dims))
        unfused = tuple(self._inside(inner) for inner in op.unfused)
        return replace(
            op,
            writes=writes,
            dims=dims,
            flops=self._share(op.flops),
            workspace=self._share(op.workspace),
            touched=self._share(op.touched),
            unfused=unfused,
        )

    def _inside(self, op: Operator) -> Operator:
        cut, _ = self._follow(op)
        if not cut:
            return op
        made = self._cut(op)
        self.parts.update(t.name for t in made.writes)
        return made

    def _reduce(self, op: Operator) -> Operator:
        name = op.writes[0].name
        return Operator(f"{name}.all_reduce", OperatorKind.COLLECTIVE, updates=(name,), collective=Collective.ALL_REDUCE, group="tensor")

    def _gather(self, whole: Operator) -> list[Operator]:
        """All columns: what arrives lies rank by rank, and a copy puts it side by side."""
        source = whole.writes[0]
        arrived, gathered = (replace(source, name=f"{source.name}.{end}") for end in ("arrived", "whole"))
        self.aliases[source.name] = gathered.name
        gather = Operator(
            f"{source.name}.all_gather",
            OperatorKind.COLLECTIVE,
            (source.name,),
            (arrived,),
            collective=Collective.ALL_GATHER,
            group="tensor",
        )
        return [gather, Operator(f"{source.name}.side_by_side", OperatorKind.COPY, (arrived.name,), (gathered,))]

    def _slice(self, op: Operator) -> tuple[list[Operator], Operator]:
        """This rank's columns of the gradient of what was gathered."""
        source = op.reads[0]
        like = next(t for o in self.whole.backward for t in o.writes if t.name == source)
        own = Tensor(f"{source}.own", self._share(like.elements), like.role, like.kind)
        self.parts.add(own.name)
        self.aliases[source] = own.name
        copy = Operator(own.name, OperatorKind.COPY, (source,), (own,))
        return [copy], replace(op, reads=tuple(own.name if n == source else n for n in op.reads))


__all__ = ["KNOWN", "WAYS", "Plan", "check_plan", "divided"]
