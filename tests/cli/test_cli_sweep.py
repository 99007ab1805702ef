import pytest


def sweep(*more):
    return ("sweep", "gpt2-small", "--cluster", "2x v100-sxm2-16gb", "--grid", "micro_batch=1,2", "--strategy", "data=2", *more)


def test_a_grid_is_a_table(run, tmp_path):
    code, out, err = run(*sweep("--cache", tmp_path / "cache", "--csv", tmp_path / "rows.csv"))
    assert code == 0, err
    assert "micro_batch" in out
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3


def test_rows_as_json(run_json):
    code, data = run_json(*sweep("--no-cache"))
    assert code == 0
    assert [r["micro_batch"] for r in data["rows"]] == [1, 2]
    assert all(r["step_time_s"] > 0 for r in data["rows"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--grid", "micro_batch=4"), "micro_batch is given twice"),
        (("--grid", "checkpoint"), "expected a field and its values"),
        (("--grid", "tensr=1"), "did you mean 'tensor'"),
        (("--jobs", 0), "Invalid value for '--jobs'"),
    ],
)
def test_bad_input_is_one_clear_line(run, words, message):
    code, out, err = run(*sweep("--no-cache", *words))
    assert (code, out) == (2, "")
    assert message in err


def test_two_strategies_are_compared(run, run_json):
    words = ("compare", "gpt2-small", "--cluster", "2x v100-sxm2-16gb", "--strategy", "data=2", "--against", "data=2,micro_batch=2")
    code, out, _ = run(*words)
    assert code == 0
    assert "Memory at its peak" in out
    code, data = run_json(*words)
    assert data.keys() == {"a", "b", "time_s", "memory_bytes"}


def test_a_plan_is_written_for_a_launcher(run):
    words = ("plan", "gpt2-small", "--cluster", "4x rtx-3090", "--global-batch", 64, "--precision", "fp32", "--zero", 0)
    code, out, err = run(*words, "--emit", "deepspeed")
    assert code == 0
    assert '"train_batch_size": 64' in out
    code, out, err = run(*words, "--emit", "deepsped")
    assert code == 2
    assert "did you mean 'deepspeed'" in err
    code, out, err = run(*words, "--fixed", "micro_batch")
    assert code == 2
    assert "not of the form" in err
