"""Tensorized layers: what they stand for, the error of a conversion, and FLOPs and memory beside a recorded step."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

import simtrain as st
from simtrain.core.errors import InputError, UnsupportedError
from simtrain.core.tensor_train import contraction, factors
from simtrain.torch.tensorized import LowRankLinear, TensorTrainConv2d, TensorTrainLinear, TuckerConv2d
from tests.torch.small_models import Perceptron, cross_entropy, fake_step, peaks, samples

torch.manual_seed(0)


def convolution(**options):
    return nn.Conv2d(6, 8, 3, **{"padding": 1, **options})


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": (0, 2), "dilation": (1, 2)}, {"bias": False}])
@pytest.mark.parametrize("kind", ["tucker", "tensor-train"])
def test_a_filter_in_full_rank_is_the_filter(kind, options):
    layer = convolution(**options)
    made = TuckerConv2d(layer, (4, 5)) if kind == "tucker" else TensorTrainConv2d(layer, (4, 7, 5))
    x = torch.randn(2, 6, 11, 13)
    same = convolution(**options)
    same.weight.data, same.bias = made.dense().data, made.widen.bias
    torch.testing.assert_close(made(x), same(x), rtol=1e-4, atol=1e-5)


def test_a_train_is_its_matrix():
    train = TensorTrainLinear((4, 3, 2), (2, 5, 3), (6, 4))
    x = torch.randn(5, 7, 24)
    torch.testing.assert_close(train(x), x @ train.dense().T + train.bias, rtol=1e-4, atol=1e-5)
    low = LowRankLinear(24, 30, 5)
    torch.testing.assert_close(low(x), x @ low.dense().T + low.u.bias, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(some.floats(0.01, 0.9), some.sampled_from(["low-rank", "tucker", "tensor-train"]))
def test_conversion_keeps_its_error_and_says_which(error, kind):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(24, 36), nn.Conv2d(6, 8, 3))
    with torch.no_grad():  # weights of nearly low rank, so that something can be saved
        model[0].weight.copy_(torch.randn(36, 2) @ torch.randn(2, 24) + 0.01 * torch.randn(36, 24))
        model[1].weight.copy_(torch.einsum("oa,bi,abkl->oikl", torch.randn(8, 2), torch.randn(2, 6), torch.randn(2, 2, 3, 3)))
    before = copy.deepcopy(model)
    for done in st.torch.tensorize(model, kind, error=error):
        original = before[int(done.name)].weight
        lost = (model[int(done.name)].dense() - original).norm() / original.norm()
        assert done.error == pytest.approx(float(lost.detach()), rel=1e-3, abs=1e-6)
        assert done.error <= error + 1e-5
        assert done.compression > 1


@pytest.mark.parametrize("kind", ["low-rank", "tensor-train"])
def test_a_compression_is_kept_and_all_of_it_used(kind):
    model = nn.Sequential(nn.Linear(64, 64))
    (done,) = st.torch.tensorize(model, kind, compression=3)
    assert 3 <= done.compression < 4.5
    if kind == "low-rank":
        assert done.ranks == (64 * 64 // 3 // 128,)


def test_low_rank_loses_the_smallest_singular_values():
    model = nn.Sequential(nn.Linear(32, 48))
    s = torch.linalg.svdvals(model[0].weight.detach())
    (done,) = st.torch.tensorize(model, "low-rank", compression=3)
    rank = done.ranks[0]
    assert done.error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-4)


def test_the_cheapest_order_by_hand():
    """With few rows the input meets one core after the other; with many, and a full rank, the matrix is made first."""
    few = contraction((16, 16), (16, 16), (2,), 1)
    assert few.flops(1) == 2 * 2 * (2 * 16**3)
    assert not few.makes_weight
    rows = 10**6
    many = contraction((16, 16), (16, 16), (256,))
    assert many.flops(rows) == 2 * 16**4 * 256 + 2 * rows * 16**4
    assert many.makes_weight


SIZES = some.integers(2, 3).flatmap(lambda n: some.tuples(*[some.lists(some.integers(2, 9), min_size=n, max_size=n)] * 2))


@settings(max_examples=60, deadline=None)
@given(SIZES, some.data())
def test_no_order_beats_that_of_many_rows_from_where_it_says(sizes, data):
    """The best order is found here by trying all of them."""
    inner, outer = map(tuple, sizes)
    most = [min(math.prod(inner[:k] + outer[:k]), math.prod(inner[k:] + outer[k:])) for k in range(1, len(inner))]
    ranks = tuple(data.draw(some.integers(1, m)) for m in most)
    plan = contraction(inner, outer, ranks)

    def best(rows):
        def least(terms):
            if len(terms) == 1:
                return 0
            found = []
            for i in range(len(terms)):
                for j in range(i):
                    rest = [t for k, t in enumerate(terms) if k not in (i, j)]
                    found.append(2 * math.prod(extents[c] for c in terms[i] | terms[j]) + least([*rest, terms[i] ^ terms[j]]))
            return min(found)

        n = len(inner)
        extents = {"rows": rows} | {("in", k): inner[k] for k in range(n)} | {("out", k): outer[k] for k in range(n)}
        extents |= {("edge", k): rank for k, rank in enumerate(ranks)}
        edges = [{("edge", e) for e in (k - 1, k) if ("edge", e) in extents} for k in range(n)]
        return least([{"rows", *(("in", k) for k in range(n))}, *({("in", k), ("out", k)} | edges[k] for k in range(n))])

    from_on = plan.best_from
    for rows in (from_on, 2 * from_on + 3, 1000 * from_on):
        assert plan.flops(rows) == best(rows)
    if from_on > 1:
        assert plan.flops(from_on - 1) > best(from_on - 1)
        assert plan.excess(from_on - 1) == plan.flops(from_on - 1) / best(from_on - 1)


@settings(max_examples=40, deadline=None)
@given(SIZES, some.booleans(), some.sampled_from([1, 50, 1 << 40]), some.data())
def test_a_train_in_any_order_is_its_matrix(sizes, bias, rows, data):
    inner, outer = sizes
    most = [min(math.prod(inner[:k] + outer[:k]), math.prod(inner[k:] + outer[k:])) for k in range(1, len(inner))]
    train = TensorTrainLinear(inner, outer, [data.draw(some.integers(1, min(m, 6))) for m in most], bias=bias, rows=rows).double()
    x = torch.randn(2, 3, math.prod(inner), dtype=torch.float64, requires_grad=True)
    y = train(x)
    torch.testing.assert_close(y, x @ train.dense().T + (train.bias if bias else 0))
    (y.square().sum()).backward()
    torch.testing.assert_close(x.grad, 2 * y @ train.dense())


@pytest.mark.parametrize("kind", ["low-rank", "tensor-train"])
def test_flops_and_memory_are_those_of_a_recorded_step(kind):
    def build():
        model = Perceptron()
        model.b = LowRankLinear(20, 60, 5) if kind == "low-rank" else TensorTrainLinear((4, 5), (6, 10), (3,))
        model.c = nn.Linear(60, 3)
        return model

    batch = samples(10)
    workload = st.torch.capture(build, batch, loss=cross_entropy)
    counted = sum(op.flops(len(batch[0]), workload.sequence) for layer in workload for op in layer.forward + layer.backward)
    assert counted == fake_step(build, batch, cross_entropy, "fp32").flops
    ours, recorded = peaks(workload, build, batch, cross_entropy, "fp32")
    assert abs(ours - recorded) <= 16  # but for scalars of the loss
    if kind == "tensor-train":
        layer = build().b
        forward = layer.plan.flops(len(batch[0]))
        plain = 2 * len(batch[0]) * (2 * 10 * 20 + 3 * 60 * 3)  # the first layer has no gradient of its input
        assert counted == plain + 3 * forward


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(InputError, match="give one of error="):
        st.torch.tensorize(nn.Linear(4, 4), "low-rank")
    with pytest.raises(InputError, match="at least 1"):
        st.torch.tensorize(nn.Linear(4, 4), "low-rank", compression=0.5)
    with pytest.raises(UnsupportedError, match="cannot be converted to tucker"):
        st.torch.tensorize(nn.Sequential(nn.Linear(4, 4)), "tucker", error=0.1, names=["0"])
    with pytest.raises(InputError, match="must lie between 1 and 4"):
        LowRankLinear(4, 8, 5)


def test_factors():
    assert factors(64) == (4, 4, 4)
    for width in (7, 60, 768, 1000):
        assert math.prod(factors(width)) == width
