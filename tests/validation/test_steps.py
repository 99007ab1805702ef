import pytest

from validation.steps import (
    CALIBRATION_STEPS,
    DEVELOPMENT_STEPS,
    MATCHED_STEPS,
    QUICK_TEST_NAMES,
    TEST_STEPS,
    TrainingStep,
    quick_test_steps,
)

EVERYTHING = CALIBRATION_STEPS + DEVELOPMENT_STEPS + TEST_STEPS + MATCHED_STEPS


def test_names_are_unique():
    assert len({s.name for s in EVERYTHING}) == len(EVERYTHING)


@pytest.mark.parametrize("option", ["hidden", "vocabulary"])
def test_the_test_list_shares_no_size_with_the_others(option):
    seen = {s.options[option] for s in CALIBRATION_STEPS + DEVELOPMENT_STEPS if option in s.options}
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


def test_calibration_covers_each_path_and_recomputation():
    assert all(s.parsed().accumulation == 1 for s in CALIBRATION_STEPS)
    assert {s.parsed().precision for s in CALIBRATION_STEPS} == {"fp32", "bf16-amp"}
    assert {s.parsed().checkpoint for s in CALIBRATION_STEPS} == {"none", "full", "every:2"}


def test_a_step_round_trips():
    assert TrainingStep.from_dict(TEST_STEPS[0].to_dict()) == TEST_STEPS[0]


def test_matched_steps_are_no_calibration_steps():
    def size(step):
        return step.workload, step.sequence, tuple(sorted(step.options.items())), step.parsed().micro_batch

    assert not {size(s) for s in MATCHED_STEPS} & {size(s) for s in CALIBRATION_STEPS + DEVELOPMENT_STEPS}
    seen = {(s.options["hidden"], s.sequence) for s in CALIBRATION_STEPS if "hidden" in s.options}
    assert not seen & {(s.options["hidden"], s.sequence) for s in MATCHED_STEPS if s.workload == "gpt"}
