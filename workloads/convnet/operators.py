"""The closed form of a residual network's training step: stem, residual blocks and head as operator lists.

The lists equal what the module in `module.py` makes PyTorch do, operator by operator and allocation by allocation. Blocks of one shape
are one layer with repeats. The size of the image is a constant: counts are polynomials in the batch alone.
"""

from __future__ import annotations

from itertools import groupby

from simtrain.core.errors import UnsupportedError
from simtrain.core.polynomial import ONE, B, as_polynomial
from simtrain.core.tensorize import Tensorization
from simtrain.core.workload import Form, Layer, Role, Tensor, Workload
from workloads.common.images import (
    Filter,
    add_in_place,
    average_pool,
    batch_norm,
    convolution,
    images,
    max_pool,
    relu_in_place,
)
from workloads.common.loss import cross_entropy, start_backward
from workloads.common.pieces import FP32, LOW, Axis, linear
from workloads.common.tape import Tape
from workloads.convnet.spec import Block, ConvNetSpec


def workload(spec: ConvNetSpec, *, name: str = "convnet", description: str = "", source: str = "", form: Form | None = None) -> Workload:
    """Returns the workload of a spec.

    Args:
        spec: The model.
        name: Of the workload.
        description: One line.
        source: Where the numbers come from.
        form: How the blocks' weights are written; nothing else of it applies to images.

    Raises:
        UnsupportedError: A form that divides layers.
    """
    form = form or Form()
    divided = [n for n in ("tensor", "context", "expert") if getattr(form, n) > 1]
    if divided:
        raise UnsupportedError(
            f"{name} is known as a whole only, so that {' and '.join(divided)} parallelism cannot divide it; data and pipeline parallelism "
            "and ZeRO can"
        )
    layers = [stem(spec)]
    for index, blocks in enumerate(spec.stages, start=1):
        groups = [(block, len(list(equal))) for block, equal in groupby(blocks)]
        names = [f"stage{index}"] if len(groups) == 1 else [f"stage{index}.first", f"stage{index}.rest"]
        for layer_name, (block, repeats) in zip(names, groups, strict=True):
            layers.append(_residual_block(spec, block, layer_name, repeats, form.tensorized))
    layers.append(head(spec))
    input_bytes = B * (4 * 3 * spec.image_size**2 + 8)
    return Workload(
        name,
        tuple(layers),
        1,
        "image",
        input_bytes,
        description,
        source,
        reform=lambda form: workload(spec, name=name, description=description, source=source, form=form),
    )


def stem(spec: ConvNetSpec) -> Layer:
    """The first convolution, its norm and activation, and (for large images) a max pool."""
    tape = Tape(images(spec.image_size))
    kernel = _filter(spec, 3, spec.width, 7, 2) if spec.stem == "imagenet" else _filter(spec, 3, spec.width, 3)
    pixels = spec.stem_edge**2
    convolution(tape, "input:images", "conv1", "c1", kernel, pixels=pixels)
    x = relu_in_place(tape, batch_norm(tape, "c1", "bn1", "n1", channels=spec.width))
    if spec.stem == "imagenet":
        x = max_pool(tape, x, "pooled", channels=spec.width, pixels=spec.first_edge**2)
    cut = B * (spec.width * spec.first_edge**2)
    return tape.layer("stem", out=x, cut=cut, cut_role=LOW, inputs=False, safe_to_recompute=spec.recomputable)


def _residual_block(spec: ConvNetSpec, block: Block, name: str, repeats: int, tensorized: Tensorization | None = None) -> Layer:
    """Two or three convolutions with norms, added to a shortcut; strides sit on the (first) 3x3 convolution, as in torchvision."""
    tape = Tape(Tensor("x", B * (block.inner * block.pixels_in), LOW), tensorized=tensorized)
    inner, width = block.inner, block.width
    if spec.bottleneck:
        filters = [_filter(spec, inner, width), _filter(spec, width, width, 3, block.stride), _filter(spec, width, block.outer)]
    else:
        filters = [_filter(spec, inner, width, 3, block.stride), _filter(spec, width, block.outer, 3)]
    x = "x"
    for number, kernel in enumerate(filters, start=1):
        pixels = block.pixels_in if spec.bottleneck and number == 1 else block.pixels
        convolution(tape, x, f"conv{number}", f"c{number}", kernel, pixels=pixels)
        last = number == len(filters)
        x = batch_norm(tape, f"c{number}", f"bn{number}", "y" if last else f"n{number}", channels=kernel.outer)
        if not last:
            relu_in_place(tape, x)
    shortcut = "x"
    if block.projected:
        convolution(tape, "x", "downsample.0", "cs", _filter(spec, inner, block.outer, 1, block.stride), pixels=block.pixels)
        shortcut = batch_norm(tape, "cs", "downsample.1", "shortcut", channels=block.outer)
    relu_in_place(tape, add_in_place(tape, "y", shortcut), holds=("x", shortcut))
    cut = B * (block.outer * block.pixels)
    return tape.layer(name, out="y", cut=cut, cut_role=LOW, repeats=repeats, safe_to_recompute=spec.recomputable, block=True)


def head(spec: ConvNetSpec) -> Layer:
    """Mean over pixels, classes, and the loss; `y` is the loss."""
    tape = Tape(Tensor("x", B * (spec.features * spec.stages[-1][-1].pixels), LOW))
    average_pool(tape, "x", "pooled", channels=spec.features)
    inner, outer = Axis(Role.CHANNELS, spec.features), Axis(Role.VOCABULARY, spec.classes)
    linear(tape, "pooled", "fc", "logits", tokens=B, inner=inner, outer=outer, bias=True, holds=("x",))
    high = tape.cast("logits", FP32)
    cross_entropy(tape, high, "", "y", rows=B, classes=as_polynomial(spec.classes), holds=(high, "x"))
    start_backward(tape)
    return tape.layer("head", out="y", cut=ONE, seed="dloss")


def _filter(spec: ConvNetSpec, inner: int, outer: int, edge: int = 1, stride: int = 1) -> Filter:
    return Filter(inner, outer, edge, stride, channels_last=spec.channels_last)
