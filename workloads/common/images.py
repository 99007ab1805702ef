"""The pieces of image networks as operators: convolution, batch norm, activation in place, sums in place, pooling.

Under autocast PyTorch convolves in the low format on casts of filter and image; batch norm, activations and pooling follow their input,
with statistics and affine parameters in fp32. Sizes are of square images, given by the pixels of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod, sqrt

from simtrain.core.polynomial import ONE, B, as_polynomial
from simtrain.core.precision import DTypeRole
from simtrain.core.workload import Dim, Operator, OperatorKind, Role, Tensor, Window, gemm_flops
from workloads.common.pieces import FP32, LOW
from workloads.common.tape import Tape


@dataclass(frozen=True, slots=True)
class Filter:
    """A convolution's filter.

    Attributes:
        inner: Channels read.
        outer: Channels written.
        edge: Edge of the window, in pixels: its width where `rows` is given.
        stride: Pixels between windows: along rows where `rows` is given.
        bias: Whether it has one.
        channels_last: Whether its images have their channels last in memory.
        rows: Height of the window; 0 where it is square.
    """

    inner: int
    outer: int
    edge: int = 1
    stride: int = 1
    bias: bool = False
    channels_last: bool = False
    rows: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the window."""
        return self.rows or self.edge, self.edge


def images(edge: int, channels: int = 3) -> Tensor:
    """The batch of images, in fp32, held by the caller."""
    return Tensor("input:images", B * (channels * edge * edge), FP32)


def convolution(tape: Tape, x: str, name: str, out: str, kernel: Filter, *, pixels: int, holds: tuple[str, ...] = ()) -> str:
    """A convolution; one backward operator writes the gradients of input, filter and bias.

    Where the tape's weights are tensorized it is a chain of convolutions.

    Args:
        tape: Where it is written.
        x: Its input; images of the batch get no gradient.
        name: Of the module; parameters are `<name>.weight` and `<name>.bias`.
        out: Name of the result.
        kernel: The filter.
        pixels: Written, for one sample and channel.
        holds: Tensors that Python names keep alive until it returns.
    """
    if tape.tensorized and (ranks := tape.tensorized.filter_ranks(kernel.inner, kernel.outer, *kernel.shape)):
        return _chain(tape, x, name, out, kernel, ranks, pixels=pixels)
    weight = tape.parameter(f"{name}.weight", kernel.outer, kernel.inner, *kernel.shape)
    b = tape.cast(tape.parameter(f"{name}.bias", kernel.outer), LOW) if kernel.bias else None
    w = tape.cast(weight, LOW)
    low = tape.cast(x, LOW)
    rows, columns, depth = B * pixels, as_polynomial(kernel.outer), as_polynomial(kernel.inner * prod(kernel.shape))
    dims = (Dim(Role.GROUPS, ONE), Dim(Role.PIXELS, rows), Dim(Role.CHANNELS, columns), Dim(Role.CHANNELS, depth))
    flops, window = gemm_flops(ONE, rows, columns, depth), Window(kernel.edge, kernel.stride, kernel.channels_last)
    reads = (low, w, b) if b else (low, w)
    written = Tensor(out, rows * kernel.outer, LOW)
    tape.run(Operator(name, OperatorKind.CONVOLUTION, reads, (written,), dims=dims, flops=flops, window=window), holds=(x, *holds))

    def node() -> None:
        names = ([] if x.startswith("input:") else [low]) + [w, *([b] if b else [])]
        gradients = [tape.gradient_tensor(n) for n in names]
        products = 1 if x.startswith("input:") else 2
        tape.run_backward(
            Operator(
                f"{name}.backward",
                OperatorKind.CONVOLUTION_BACKWARD,
                (tape.gradient(out), low, w),
                tuple(gradients),
                dims=dims,
                flops=products * flops,
                launches=products + kernel.bias,
                window=window,
            )
        )
        for name_of, gradient in zip(names, gradients, strict=True):
            tape.give(name_of, gradient.name)

    tape.node(node)
    return out


def _chain(tape: Tape, x: str, name: str, out: str, kernel: Filter, ranks: tuple[int, ...], *, pixels: int) -> str:
    """The convolutions of a Tucker form (two ranks) or of a train (three), as `simtrain.torch.tensorized` runs them."""
    into, before = ranks[0], round(tape.tensors[x].elements(1, 1) / kernel.inner)
    plain = replace(kernel, edge=1, stride=1, bias=False)
    links = [("narrow", replace(plain, outer=into), before)]
    if len(ranks) == 2:
        links.append(("core", replace(kernel, inner=into, outer=ranks[1], bias=False), pixels))
    else:
        down = round(sqrt(before * pixels))  # its rows are those of the result already, its columns not yet
        links.append(("rows", replace(plain, inner=into, outer=ranks[1], rows=kernel.edge), down))
        links.append(("columns", replace(plain, inner=ranks[1], outer=ranks[2], edge=kernel.edge, stride=kernel.stride, rows=1), pixels))
    links.append(("widen", replace(plain, inner=ranks[-1], bias=kernel.bias), pixels))
    with tape.whole_weights():
        held = x
        for part, link, written in links:
            last = part == "widen"
            x = convolution(tape, x, f"{name}.{part}", out if last else f"{out}.{part}", link, pixels=written, holds=(held,))
    return x


def batch_norm(tape: Tape, x: str, name: str, out: str, *, channels: int) -> str:
    """Batch norm with the statistics of the batch: mean and reciprocal deviation are kept, running statistics updated in place.

    Its launches are the norm itself and the counter of batches.
    """
    like = tape.tensors[x]
    parameters = [tape.parameter(f"{name}.weight", channels), tape.parameter(f"{name}.bias", channels)]
    tape.buffer(2 * 4 * channels + 8)
    statistics = [Tensor(f"{out}.{s}", as_polynomial(channels), FP32) for s in ("mean", "rstd")]
    written = (Tensor(out, like.elements, like.role), *statistics)
    tape.run(Operator(name, OperatorKind.BATCH_NORM, (x, *parameters), written, launches=2))

    def node() -> None:
        gradients = [tape.gradient_tensor(n) for n in (x, *parameters)]
        reads = (tape.gradient(out), x, parameters[0], *(t.name for t in statistics))
        tape.run_backward(Operator(f"{name}.backward", OperatorKind.BATCH_NORM_BACKWARD, reads, tuple(gradients)))
        for name_of, gradient in zip((x, *parameters), gradients, strict=True):
            tape.give(name_of, gradient.name)

    tape.node(node)
    return out


def relu_in_place(tape: Tape, x: str, *, holds: tuple[str, ...] = ()) -> str:
    """Overwrites a tensor by its positive part; the backward pass reads the result."""
    like = tape.tensors[x]
    tape.run(Operator(f"{x}.relu", OperatorKind.ELEMENTWISE, updates=(x,)), holds=holds)

    def node() -> None:
        before = Tensor(f"d{x}.before_relu", like.elements, like.role)
        tape.run_backward(Operator(f"{x}.relu.backward", OperatorKind.ELEMENTWISE, (tape.take(x), x), (before,)))
        tape.give(x, before.name)

    tape.node(node)
    return x


def add_in_place(tape: Tape, x: str, other: str) -> str:
    """Adds a tensor to another, which it overwrites; its gradient goes to both as it is."""
    tape.run(Operator(f"{x}.add", OperatorKind.ELEMENTWISE, (other,), updates=(x,)))

    def node() -> None:
        gradient = tape.take(x)
        tape.give(x, gradient)
        tape.give(other, gradient)

    tape.node(node)
    return x


def max_pool(tape: Tape, x: str, out: str, *, channels: int, pixels: int) -> str:
    """The largest pixel of every window, with its index (int64); the backward pass is also handed the input, which it does not read."""
    like, elements = tape.tensors[x], B * (channels * pixels)
    written = (Tensor(out, elements, like.role), Tensor(f"{out}.indices", elements, DTypeRole.INDEX))
    tape.run(Operator(out, OperatorKind.POOLING, (x,), written))

    def node() -> None:
        dx = tape.gradient_tensor(x)
        reads = (tape.gradient(out), f"{out}.indices", x)
        tape.run_backward(Operator(f"{out}.backward", OperatorKind.POOLING_BACKWARD, reads, (dx,), partial=(x,)))
        tape.give(x, dx.name)

    tape.node(node)
    return out


def average_pool(tape: Tape, x: str, out: str, *, channels: int) -> str:
    """The mean over all pixels; its gradient is spread over them."""
    like = tape.tensors[x]
    tape.run(Operator(out, OperatorKind.REDUCTION, (x,), (Tensor(out, B * channels, like.role),)))

    def node() -> None:
        dx = tape.gradient_tensor(x)
        tape.run_backward(Operator(f"{out}.spread", OperatorKind.ELEMENTWISE, (tape.gradient(out),), (dx,)))
        tape.give(x, dx.name)

    tape.node(node)
    return out
