import json

import pytest

from simtrain import schedule
from simtrain.core.result import MemoryReport, Result

STRATEGY = "data=4,micro_batch=4,accumulation=2,precision=fp16-amp"
PREDICT = ("predict", "gpt2-small", "--cluster", "4x rtx-3090")


def test_it_prints_time_memory_and_what_bounds_the_step(run):
    code, out, err = run(*PREDICT, "--strategy", STRATEGY)
    assert (code, err) == (0, "")
    for word in ("step time", "samples/s", "MFU", "bound by", "Memory at its peak", "Assumed or left out", "Rests on"):
        assert word in out


@pytest.mark.parametrize("reader", ["schedule", "estimate", "simulate"])
def test_json_is_the_result_with_its_own_field_names(run_json, reader):
    code, data = run_json(*PREDICT, "--strategy", STRATEGY, "--reader", reader)
    assert code == 0
    assert data.keys() == set(Result.__dataclass_fields__) - {"events"}
    assert data["memory"].keys() == set(MemoryReport.__dataclass_fields__) - {"timeline"} | {"fits", "over_bytes"}
    assert data["reader"] == reader
    assert sum(data["breakdown_s"].values()) == pytest.approx(data["step_time_s"], rel=1e-9)
    assert data["global_batch"] == 32


def test_it_answers_what_the_library_answers(run_json):
    _, data = run_json(*PREDICT, "--strategy", STRATEGY)
    assert data == json.loads(json.dumps(schedule("gpt2-small", "4x rtx-3090", STRATEGY).to_dict()))


def test_a_shorter_sequence_takes_less(run_json):
    (_, long), (_, short) = run_json(*PREDICT, "--strategy", STRATEGY), run_json(*PREDICT, "--strategy", STRATEGY, "--seq-len", 128)
    assert short["step_time_s"] < long["step_time_s"]
    assert short["tokens_per_s"] == pytest.approx(128 * short["samples_per_s"])


def test_what_does_not_fit_is_answered_all_the_same_with_exit_code_1(run, run_json):
    tight = (*PREDICT, "--strategy", "data=4,micro_batch=256")
    code, out, _ = run(*tight)
    assert code == 1
    assert "DOES NOT FIT, over by" in out
    assert "step time" in out
    code, data = run_json(*tight)
    assert code == 1
    assert data["fits"] is False
    assert data["memory"]["over_bytes"] > 0


def test_a_strategy_can_come_from_a_file(run_json, tmp_path):
    from simtrain import Strategy

    path = tmp_path / "how.toml"
    path.write_text(Strategy.parse(STRATEGY).to_toml())
    assert run_json(*PREDICT, "--strategy", path) == run_json(*PREDICT, "--strategy", STRATEGY)


def test_boards_that_are_all_alike_are_faster_than_the_slowest_of_many(run_json):
    asked = ("predict", "gpt2-small", "--cluster", "8x a100-sxm-80g", "--strategy", "data=8,micro_batch=8,precision=bf16-amp")
    _, usual = run_json(*asked)
    _, alike = run_json(*asked, "--speed-spread", "0")
    assert alike["step_time_s"] < usual["step_time_s"]
    assert any("speed_spread" in a for a in usual["assumptions"])
    assert not any("speed_spread" in a for a in alike["assumptions"])


def test_stragglers_and_jitter_are_simulated_without_being_told_to(run_json):
    _, base = run_json(*PREDICT, "--strategy", STRATEGY, "--reader", "simulate")
    _, slow = run_json(*PREDICT, "--strategy", STRATEGY, "--straggler", "3=1.5")
    assert slow["reader"] == "simulate"
    assert slow["step_time_s"] > 1.2 * base["step_time_s"]
    _, noisy = run_json(*PREDICT, "--strategy", STRATEGY, "--jitter", "0.05", "--seed", "1", "--steps", "5")
    assert noisy["reader"] == "simulate"
    assert noisy["step_time_s"] > base["step_time_s"]


def test_the_same_seed_gives_the_same_answer(run_json):
    noisy = (*PREDICT, "--strategy", STRATEGY, "--jitter", "0.05", "--steps", "3", "--seed")
    assert run_json(*noisy, "7") == run_json(*noisy, "7")
    assert run_json(*noisy, "7") != run_json(*noisy, "8")


def test_pictures_and_the_trace_are_written_and_named(run, tmp_path):
    files = {"--timeline": tmp_path / "t.png", "--memory-plot": tmp_path / "m.svg", "--trace": tmp_path / "s.json"}
    code, out, err = run(*PREDICT, "--strategy", STRATEGY, "--json", *(word for pair in files.items() for word in pair))
    assert code == 0
    assert json.loads(out)["reader"] == "schedule", "notes about files stay out of standard output"
    assert all(f"wrote {path}" in err for path in files.values())
    assert files["--timeline"].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files["--memory-plot"].read_text()
    assert json.loads(files["--trace"].read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reader", "estimate", "--trace", "x.json"), "the reader estimate keeps no timeline"),
        (("--reader", "schedule", "--jitter", "0.1"), "--jitter needs --reader simulate, not schedule"),
        (("--reader", "estimate", "--straggler", "1=2"), "--straggler needs --reader simulate, not estimate"),
        (("--timeline", "x.gif"), "--timeline x.gif: the file must end in .png or .svg or .pdf"),
        (("--trace", "x.txt"), "--trace x.txt: the file must end in .json"),
        (("--memory-plot", "nowhere/x.png"), "--memory-plot nowhere/x.png: there is no folder nowhere"),
        (("--straggler", "three"), "--straggler 'three': expected RANK=FACTOR, such as 3=1.5"),
        (("--straggler", "9=1.5"), "there is no rank 9; the strategy uses ranks 0 to 3"),
        (("--straggler", "1=-2"), "the factor must be a number above zero"),
        (("--straggler", "1=nan"), "the factor must be a number above zero"),
        (("--straggler", "1=2", "--straggler", "1=3"), "rank 1 is given twice"),
        (("--runtime", "torch-eagre"), "unknown runtime 'torch-eagre': did you mean 'torch-eager'"),
        (("--seq-len", "0"), "Invalid value for '--seq-len'"),
        (("--seq-len", "many"), "Invalid value for '--seq-len'"),
        (("--reader", "guess"), "'guess' is not one of 'estimate', 'schedule', 'simulate'"),
        (("--jitter", "-1"), "Invalid value for '--jitter'"),
        (("--sead", "1"), "No such option: --sead"),
    ],
)
def test_bad_options_are_one_clear_line(run, words, message):
    code, out, err = run(*PREDICT, "--strategy", STRATEGY, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("workload", "cluster", "strategy", "kind", "message"),
    [
        ("gpt2-smal", "4x rtx-3090", STRATEGY, "UnknownNameError", "unknown workload 'gpt2-smal': did you mean 'gpt2-small'"),
        ("gpt2-small", "4x rtx-3091", STRATEGY, "UnknownNameError", "unknown device 'rtx-3091': did you mean 'RTX3090-24GB'"),
        ("gpt2-small", "", STRATEGY, "InputError", "cannot read the cluster ''"),
        ("gpt2-small", "mine.toml", STRATEGY, "CatalogError", "mine.toml: there is no such cluster file"),
        ("gpt2-small", "4x rtx-3090", "dta=4", "StrategyError", "a strategy has no field 'dta': did you mean 'data'?"),
        ("gpt2-small", "4x rtx-3090", "data=four", "StrategyError", "data must be a whole number, not 'four'"),
        ("gpt2-small", "4x rtx-3090", "precision=fp17", "UnknownNameError", "unknown precision 'fp17'"),
        ("gpt2-small", "4x rtx-3090", "how.toml", "InputError", "cannot read the strategy file how.toml: No such file"),
    ],
)
def test_bad_input_has_exit_code_2_and_names_the_mistake(run, run_json, workload, cluster, strategy, kind, message):
    words = ("predict", workload, "--cluster", cluster, "--strategy", strategy)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    code, data = run_json(*words)
    assert code == 2
    assert data.keys() == {"error"}
    assert data["error"]["type"] == kind
    assert data["error"]["exit_code"] == 2
    assert data["error"]["message"].startswith(message)


def test_more_ranks_than_devices_are_refused(run):
    code, _, err = run(*PREDICT, "--strategy", "data=8")
    assert code == 2
    assert "8" in err
    assert "4" in err


def test_what_is_not_modelled_has_exit_code_3(run_json):
    code, data = run_json("predict", "resnet50", "--cluster", "4x rtx-3090", "--strategy", "data=2,tensor=2")
    assert code == 3
    assert data["error"]["type"] == "UnsupportedError"
    assert data["error"]["exit_code"] == 3


def test_a_device_without_the_arithmetic_is_not_modelled(run_json):
    code, data = run_json("predict", "gpt2-small", "--cluster", "1x v100-sxm-32g", "--strategy", "data=1,precision=tf32")
    assert code == 3
    assert "no tf32 arithmetic; it has" in data["error"]["message"]


def test_what_does_not_fit_is_told_the_smallest_change_that_does(run):
    code, out, _ = run("predict", "gpt2-small", "--cluster", "4x rtx-3090", "--strategy", "data=4,micro_batch=32")
    assert code == 1
    assert "Smallest changes with which it fits" in out
    assert "micro_batch=16, accumulation=2" in out
