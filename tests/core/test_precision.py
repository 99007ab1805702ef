import pytest

from simtrain.core.errors import UnknownNameError
from simtrain.core.precision import PRECISIONS, DType, DTypeRole, precision


def test_every_number_format_has_a_size():
    assert {d: d.size_bytes for d in DType} | {DType.TF32: 4, DType.BF16: 2, DType.INT64: 8} == {d: d.size_bytes for d in DType}
    assert all(d.size_bytes >= 1 for d in DType)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_recipe_gives_every_role_a_format(name):
    recipe = precision(name)
    assert recipe.name == name
    assert {role: recipe.dtype(role) for role in DTypeRole}.keys() == set(DTypeRole)
    assert recipe.dtype(DTypeRole.FP32) is DType.FP32
    assert recipe.dtype(DTypeRole.INDEX) is DType.INT64
    assert recipe.dtype(DTypeRole.GRADIENT) is recipe.parameter


def test_autocast_keeps_fp32_weights_and_16_bit_operands():
    recipe = precision("fp16-amp")
    assert recipe.autocast
    assert recipe.dtype(DTypeRole.LOW) is DType.FP16
    assert recipe.dtype(DTypeRole.PARAMETER) is recipe.dtype(DTypeRole.HIGH) is DType.FP32


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_recipes_of_one_storage_format_are_no_autocast(name):
    assert not precision(name).autocast


def test_only_fp16_scales_the_loss():
    assert [p.name for p in PRECISIONS.values() if p.loss_scaling] == ["fp16-amp", "fp16-master"]


def test_tf32_stores_fp32_but_runs_on_its_own_path():
    recipe = precision("tf32")
    assert recipe.dtype(DTypeRole.LOW) is DType.FP32
    assert recipe.arithmetic is DType.TF32


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'fp16-amp'"):
        precision("fp16-apm")
