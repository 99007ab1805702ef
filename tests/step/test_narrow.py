"""Linear layers in fp8 and fp4: what runs narrow, what it moves and keeps, who can do it."""

import math

import pytest

import simtrain as st
from simtrain.core import catalog
from simtrain.core.errors import UnsupportedError
from simtrain.core.precision import DType, precision
from simtrain.core.result import MemoryKind
from simtrain.core.runtimes import RUNTIMES
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Collective, OperatorKind
from simtrain.step.fully_sharded import gathered_bytes
from simtrain.step.kernels import payload_bytes, tensor_bytes
from simtrain.step.layout import lay_out
from simtrain.step.narrow_check import has_format
from simtrain.step.occupancy import Mode, PassContext, Sizer, occupancy
from simtrain.step.setting import resolve
from simtrain.step.specialize import ConcreteLayer
from simtrain.step.split_backward import split_backward
from simtrain.step.states import persistent

RECIPES = ("fp8", "fp8-params", "fp8-current", "mxfp8", "nvfp4")
FORMS = ("data=1", "tensor=2", "tensor=2,sequence_parallel=true", "context=2", "data=2,zero=3", "data=2,zero=3,checkpoint=selective-op")
MODEL = {"layers": 2, "hidden": 256, "heads": 4, "vocabulary": 1024}


def block(
    recipe: str, device: str = "b200", form: str = "data=1", runtime: str = "megatron", model: str = "llama3-8b", **options: object
) -> ConcreteLayer:
    strategy = Strategy.parse(f"{form},precision={recipe},micro_batch=2")
    workload = catalog.workload(model, seq_len=512, **(MODEL | {"kv_heads": 4, "ffn": 512} | options))
    layout = lay_out(resolve(workload, f"{strategy.ranks}x {device}", strategy, runtime))
    return next(c for c in layout.lanes[0].chunks[0].concrete if c.layer.block)


def gemms(concrete: ConcreteLayer) -> list:
    return [op for op in concrete.forward + concrete.backward if op.kind is OperatorKind.GEMM]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_product_with_a_weight_runs_narrow_and_does_the_same_work(recipe: str, form: str) -> None:
    narrow, wide = block(recipe, form=form), block("bf16-master", form=form)
    assert [op.name for op in gemms(narrow)] == [op.name for op in gemms(wide)]
    assert all(narrow.arithmetic(op) is precision(recipe).fastest for op in gemms(narrow))
    assert all(narrow.dtype(op.reads[i]) is precision(recipe).fastest for op in gemms(narrow) for i in (0, 1))
    assert sum(op.flops(2, 512) for op in gemms(narrow)) == sum(op.flops(2, 512) for op in gemms(wide))
    others = [op for op in narrow.forward + narrow.backward if op.kind is OperatorKind.ATTENTION]
    assert all(narrow.arithmetic(op) is DType.BF16 for op in others)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("runtime", ["megatron", "torch-eager"])
def test_nothing_is_read_before_it_is_written_nor_written_twice(recipe: str, form: str, runtime: str) -> None:
    concrete = block(recipe, form=form, runtime=runtime)
    there = {"x", "dy"} | {p.name for p in concrete.layer.parameters}
    copies = {n for n in concrete.tensors if n.rpartition(":")[0] in concrete.narrow_weights}
    there |= copies - {w.name for op in concrete.forward + concrete.backward for w in op.writes}
    for op in concrete.forward + concrete.backward:
        assert {n for n in (*op.reads, *op.updates) if n not in op.partial} <= there, op.name
        for tensor in op.writes:
            assert tensor.name not in there, (op.name, tensor.name)
            there.add(tensor.name)
    assert {f"grad:{p.name}" for p in concrete.layer.parameters} <= there
    halves = split_backward(concrete)
    assert len(halves.input_gradient) + len(halves.weight_gradient) == len(concrete.backward)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", FORMS)
def test_what_a_pass_keeps_its_backward_pass_releases(recipe: str, form: str) -> None:
    concrete = block(recipe, form=form)
    sizer = Sizer(concrete, 2, 512, RUNTIMES["megatron"])
    context = PassContext(None, MemoryKind.TRANSIENT)
    forward = occupancy(concrete, Mode.FORWARD, context, sizer).net.sum()
    backward = occupancy(concrete, Mode.BACKWARD_ACCUMULATING, context, sizer).net.sum()
    # what crosses layers: y stays, dy goes, dx stays
    crossing = sizer.crossing(concrete.layer, MemoryKind.TRANSIENT).sum()
    assert forward + backward == pytest.approx(crossing, abs=1)


def test_inputs_are_saved_once_at_one_byte_an_element() -> None:
    """Transformer Engine's documentation: of a linear layer's input, the copy by columns alone is kept."""
    for device in ("h100", "b200"):
        concrete = block("fp8", device)
        kept = [n for n in concrete.saved if ":" in n]
        assert len(kept) == 4  # inputs of query/key/value, projection, gate/up and down
        for name in kept:
            assert tensor_bytes(name, concrete, 2, 512) in (2 * 512 * 256, 2 * 512 * 512)
        wide = block("bf16-master", device)
        assert "n1" in wide.saved
        assert "n1" not in concrete.saved


@pytest.mark.parametrize(
    ("recipe", "device", "bytes_per_weight"), [("fp8", "h100", 2.0), ("fp8", "b200", 1.0), ("mxfp8", "b200", 2 * 33 / 32)]
)
def test_weights_keep_narrow_copies_beside_16_bit_ones(recipe: str, device: str, bytes_per_weight: float) -> None:
    """Hopper needs a transposed copy of each weight, Blackwell none unless scales belong to blocks."""
    workload = catalog.workload("llama3-8b", seq_len=512)
    wide, narrow = (st.estimate(workload, device, f"precision={p}", runtime="megatron").memory for p in ("bf16-master", recipe))
    linear = sum(x.repeats * p.elements for x in workload.layers if x.block for p in x.parameters if len(p.shape) == 2)
    assert narrow.by_kind_bytes["cast"] - wide.by_kind_bytes.get("cast", 0.0) == pytest.approx(linear * bytes_per_weight)


def test_weights_without_16_bit_ones_beside_them_save_two_bytes_each() -> None:
    workload = catalog.workload("llama3-8b", seq_len=512)
    form = "data=8,zero=1,accumulation=4,precision="
    beside, alone = (st.schedule(workload, "dgx-h100", form + p, runtime="megatron") for p in ("fp8", "fp8-params"))
    linear = sum(x.repeats * p.elements for x in workload.layers if x.block for p in x.parameters if len(p.shape) == 2)
    saved = beside.memory.by_kind_bytes["parameter"] - alone.memory.by_kind_bytes["parameter"]
    assert saved == pytest.approx(2 * linear)
    assert alone.step_time_s < beside.step_time_s  # less is gathered
    quick = st.estimate(workload, "dgx-h100", form + "fp8-params", runtime="megatron")
    assert quick.step_time_s == pytest.approx(alone.step_time_s, rel=0.03)


def test_gathers_of_sequence_parallelism_carry_narrow_copies() -> None:
    wide, narrow = (block(p, "h100", "tensor=2,sequence_parallel=true") for p in ("bf16-master", "fp8"))
    both = [[op for op in c.forward + c.backward if op.kind is OperatorKind.COLLECTIVE] for c in (wide, narrow)]
    for one, other in zip(*both, strict=True):
        sizes = payload_bytes(one, wide, 2, 512), payload_bytes(other, narrow, 2, 512)
        assert sizes[0] == sizes[1] * (2 if one.collective is Collective.ALL_GATHER else 1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("checkpoint", ["none", "selective-op", "full"])
def test_fully_sharded_weights_leave_no_narrow_copies_behind(recipe: str, checkpoint: str) -> None:
    """torchtitan's documentation of fp8: copies of gathered weights are made anew in backward, not saved for it."""
    concrete = block(recipe, form=f"data=2,zero=3,checkpoint={checkpoint}")
    assert not [n for n in concrete.saved if n.rpartition(":")[0] in concrete.narrow_weights]
    made = {w.name for op in concrete.forward for w in op.writes} & {f"{n}:rows" for n in concrete.narrow_weights}
    assert len(made) == (0 if recipe == "fp8-params" else len(concrete.narrow_weights))
    strategy = Strategy.parse(f"data=8,zero=3,precision={recipe},checkpoint={checkpoint}")
    setting = resolve(catalog.workload("llama3-8b"), "dgx-b200", strategy, "fsdp2")
    lane = lay_out(setting).lanes[0]
    assert persistent(setting, lane).sum() == pytest.approx(4 * 3 * 8.03e9 / 8, rel=0.01)  # masters and two moments in fp32


def test_weights_that_are_cast_before_they_are_gathered_travel_at_one_byte_each() -> None:
    """What a block's gather takes: a byte per weight of its linear layers and two per weight of its norms."""
    workload = catalog.workload("llama3-8b", seq_len=512)
    own = next(x for x in workload.layers if x.block)
    linear = sum(p.elements for p in own.parameters if len(p.shape) == 2)
    for narrow_gather, size in ((False, 2), (True, 1)):
        runtime = RUNTIMES["fsdp2"].with_(narrow_gather=narrow_gather)
        strategy = Strategy.parse("data=8,zero=3,precision=fp8-current")
        layout = lay_out(resolve(workload, "dgx-h100", strategy, runtime))
        gathered = gathered_bytes(layout, layout.lanes[0], 0, 1)
        assert gathered == pytest.approx(size * linear + 2 * (own.parameter_count - linear))


def test_gathering_narrow_weights_is_faster_and_fp8_is_faster_than_16_bit_ones() -> None:
    form = "data=64,zero=3,precision="
    narrow = RUNTIMES["fsdp2"].with_(narrow_gather=True)
    asked = (("fp8-current", narrow), ("fp8-current", "fsdp2"), ("bf16-master", "fsdp2"))
    times = [st.schedule("llama3-70b", "8x dgx-h100", form + p, runtime=r).step_time_s for p, r in asked]
    assert times == sorted(times)
    quick = st.estimate("llama3-70b", "8x dgx-h100", form + "fp8-current", runtime=narrow).step_time_s
    assert quick == pytest.approx(times[0], rel=0.03)


@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_products_of_experts_run_narrow_and_routers_do_not(recipe: str) -> None:
    options = {"model": "llama", "experts": 8, "top_k": 2, "expert_ffn": 512}
    narrow, wide = (block(p, form="expert=2,data=2", **options) for p in (recipe, "bf16-master"))
    grouped = [[op for op in c.forward + c.backward if op.kind is OperatorKind.BATCHED_GEMM] for c in (narrow, wide)]
    assert [op.name for op in grouped[0]] == [op.name for op in grouped[1]]
    assert len(grouped[0]) == 9  # gate, up and down, forward and both gradients
    assert all(narrow.dtype(op.reads[i]) is precision(recipe).fastest for op in grouped[0] for i in (0, 1))
    assert all(narrow.arithmetic(op) is precision(recipe).fastest for op in grouped[0])
    assert sum(op.flops(2, 512) for op in grouped[0]) == sum(op.flops(2, 512) for op in grouped[1])
    router = next(op for op in narrow.forward if op.name == "mlp.router")
    assert narrow.arithmetic(router) is DType.BF16


def test_fp8_is_faster_where_products_are_large_and_not_by_more_than_its_peak() -> None:
    form = "data=8,micro_batch=1,accumulation=8,zero=1,precision="
    times = {
        p: st.estimate("llama3-8b", "dgx-h100", form + p, runtime="megatron").step_time_s for p in ("bf16-master", "fp8", "fp8-current")
    }
    assert 0.5 < times["fp8"] / times["bf16-master"] < 1
    assert times["fp8"] < times["fp8-current"] < times["bf16-master"]  # a pass of its own for the largest magnitude costs


def test_a_device_without_the_format_is_refused_with_those_that_have_it() -> None:
    with pytest.raises(UnsupportedError, match=r"A100.*has not: use bf16-master, or one of .*H100-SXM5-80GB") as caught:
        st.estimate("gpt2-small", "a100", "precision=fp8")
    assert "A100" not in str(caught.value).split("one of")[1]
    with pytest.raises(UnsupportedError, match=r"scale per 32 elements, which H100.*one of B200"):
        st.estimate("gpt2-small", "h100", "precision=mxfp8")
    with pytest.raises(UnsupportedError, match=r"as GPUs carry it out, and Gaudi2.*systolic"):
        st.estimate("gpt2-small", "gaudi2", "precision=fp8")


@pytest.mark.parametrize(
    ("model", "strategy", "match"),
    [
        ("gpt2-small", "zero=3,data=2,compression=zero++", "compression=zero"),
        ("resnet50", "data=1", "no linear layers"),
    ],
)
def test_what_is_not_modelled_is_refused(model: str, strategy: str, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        st.estimate(model, "8x h100", f"{strategy},precision=fp8")


def test_a_device_with_a_format_has_all_wider_ones() -> None:
    form = precision("nvfp4").narrow
    assert form is not None
    having = [catalog.device(n) for n in catalog.names("devices") if has_format(catalog.device(n), form)]
    assert len(having) >= 5
    for device in having:
        assert device.peak(DType.FP4) > device.peak(DType.FP8) > device.peak(DType.BF16)


def test_a_copy_of_32_elements_with_one_scale_takes_33_bytes() -> None:
    mx, nv = precision("mxfp8").narrow, precision("nvfp4").narrow
    assert mx is not None
    assert nv is not None
    assert 32 * mx.bytes_per_element == 33
    assert 16 * nv.bytes_per_element == 9
    assert math.isclose(mx.weight_bytes, 2 * mx.bytes_per_element)
