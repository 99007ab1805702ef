import pytest

from validation.steps import CALIBRATION_STEPS, DEVELOPMENT_STEPS, QUICK_TEST_NAMES, TEST_STEPS, TrainingStep, quick_test_steps

EVERYTHING = CALIBRATION_STEPS + DEVELOPMENT_STEPS + TEST_STEPS


def test_names_are_unique():
    assert len({s.name for s in EVERYTHING}) == len(EVERYTHING)


@pytest.mark.parametrize("option", ["hidden", "vocabulary"])
def test_the_test_list_shares_no_size_with_the_others(option):
    seen = {s.options[option] for s in CALIBRATION_STEPS + DEVELOPMENT_STEPS}
    assert not seen & {s.options[option] for s in TEST_STEPS}


def test_the_test_list_shares_no_sequence_length_with_the_others():
    assert not {s.sequence for s in CALIBRATION_STEPS + DEVELOPMENT_STEPS} & {s.sequence for s in TEST_STEPS}


def test_the_test_list_covers_what_it_must():
    strategies = [s.parsed() for s in TEST_STEPS]
    assert len(TEST_STEPS) >= 10
    assert {"adamw", "sgd"} <= {s.optimizer for s in strategies}
    assert {"full", "every:2"} <= {s.checkpoint for s in strategies}
    assert any(2 <= s.accumulation <= 4 for s in strategies)


def test_the_quick_list_is_part_of_the_test_list():
    assert {s.name for s in quick_test_steps()} == set(QUICK_TEST_NAMES)


def test_calibration_steps_are_plain():
    assert all(s.parsed().checkpoint == "none" and s.parsed().accumulation == 1 for s in CALIBRATION_STEPS)


def test_a_step_round_trips():
    assert TrainingStep.from_dict(TEST_STEPS[0].to_dict()) == TEST_STEPS[0]
