import inspect

import pytest

from simtrain.core import errors
from simtrain.core.errors import InputError, SimtrainError, StrategyError, UnknownNameError, UnsupportedError, fold, nearest

KNOWN = ("rtx-3090", "rtx-4090", "a100-sxm-80g", "a100-pcie-40g", "h100-sxm")


def test_every_public_error_descends_from_the_base_and_stands_in_the_tree():
    for name, item in inspect.getmembers(errors, inspect.isclass):
        if item.__module__ == errors.__name__:
            assert issubclass(item, SimtrainError)
            assert name in errors.__doc__


def test_exit_codes_follow_the_tree():
    assert [e.exit_code for e in (InputError, StrategyError, UnknownNameError, UnsupportedError, errors.InternalError)] == [2, 2, 2, 3, 4]


def test_names_fold_over_case_spaces_and_hyphens():
    assert fold("RTX 3090") == fold("rtx-3090") == "rtx3090"
    assert fold("GPT3 1.3B.") == "gpt31.3b"
    assert fold("gpt3-13b") == "gpt313b"


def test_the_nearest_name_comes_first():
    assert nearest("rtx-309", KNOWN)[0] == "rtx-3090"


def test_names_that_begin_with_the_text_come_before_those_that_look_like_it():
    assert nearest("a100", KNOWN)[:2] == ("a100-sxm-80g", "a100-pcie-40g")
    assert nearest("fp16", ("bf16", "fp16-amp"))[0] == "fp16-amp"


def test_a_last_character_too_many_still_finds_long_names():
    assert nearest("v1000", ["V100-SXM2-16GB", "A100-SXM4-80GB"]) == ("V100-SXM2-16GB",)


def test_nothing_is_near_to_nonsense():
    assert nearest("zzzzzz", KNOWN) == ()
    assert nearest("", KNOWN) == ()


def test_an_unknown_name_suggests_the_nearest():
    error = UnknownNameError("device", "rtx-309", KNOWN)
    assert str(error).startswith("unknown device 'rtx-309': did you mean 'rtx-3090'")
    assert error.suggestions[0] == "rtx-3090"


def test_an_unknown_name_without_neighbours_lists_what_is_known():
    assert str(UnknownNameError("precision", "zzz", ("fp32", "bf16"))) == "unknown precision 'zzz': known: bf16, fp32"
    assert str(UnknownNameError("precision", "zzz", ())) == "unknown precision 'zzz': known: none"


@pytest.mark.parametrize("count", [1, 2])
def test_no_more_suggestions_than_asked_for(count):
    assert len(nearest("rtx", KNOWN, count=count)) == count
