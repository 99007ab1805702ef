import json
import math

import pytest

import simtrain as st

HOW = "data=4,micro_batch=8,accumulation=4,precision=fp16-amp"
RUN = ("run", "gpt2-small", "--cluster", "4x rtx-3090", "--strategy", HOW)


def test_it_prints_when_it_is_done_and_where_the_time_goes(run, tmp_path):
    picture = tmp_path / "run.png"
    code, out, err = run(*RUN, "--target-loss", 3.5, "--mtbf-h", 2, "--region", "germany", "--seeds", 3, "--plot", str(picture))
    assert code == 0
    for word in ("goodput", "recomputed", "restart", "CO2e", "p10", "Assumed or left out", "Rests on"):
        assert word in out
    assert picture.stat().st_size > 10_000
    assert "wrote" in err


def test_json_is_the_library_s_answer(run_json):
    code, data = run_json(*RUN, "--steps", 500, "--mtbf-h", 2, "--seed", 5)
    assert code == 0
    faults = st.Faults(mtbf_h=2)
    result = st.simulate_run("gpt2-small", "4x rtx-3090", HOW, until=st.Target(steps=500), faults=faults, seed=5)
    assert data == json.loads(json.dumps(result.to_dict()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target-loss", 2.0), "floor for 1.244e+08 parameters is 2.4089"),
        (("--steps", 5, "--tokens", 5), "exactly one"),
        ((), "exactly one"),
        (("--steps", 5, "--mtbf-h", -3), "mtbf_h must be a number above zero"),
        (("--steps", 5, "--mtbf-h", 3, "--spares", 4), "8 devices"),
        (("--steps", 100_000, "--mtbf-h", 0.001), "something fails every 3.60 s on average, and a restart takes 300 s"),
        (("--steps", 5, "--pricing", "spot", "--usd-per-device-h", 0), "above zero with pricing 'spot'"),
        (("--steps", 5, "--preemption-h", 0), "Preemption: mtbf_h must be a number above zero"),
        (("--steps", 5, "--region", "germny"), "did you mean 'germany'"),
        (("--steps", 5, "--plot", "run.txt"), ".png"),
        (("--steps", 5, "--batch-policy", "dynamic"), "needs a loss as target"),
        (("--target-loss", 3.5, "--max-batch", 64), "belongs to --batch-policy dynamic"),
    ],
)
def test_bad_input_is_refused_with_what_is_allowed(run, options, words):
    code, out, err = run(*RUN, *options)
    assert (code, out) == (2, "")
    assert words in err


def test_a_dynamic_batch_and_its_input_are_asked_from_the_command_line(run, run_json):
    code, dynamic = run_json(*RUN, "--target-loss", 3.6, "--batch-policy", "dynamic")
    assert code == 0
    _, fixed = run_json(*RUN, "--target-loss", 3.6)
    assert dynamic["time_s"] < fixed["time_s"]
    assert len({row[2] for row in dynamic["curve"]}) > 1
    code, fed = run_json("data", *RUN[1:], "--sample-cpu-s", 0.2, "--workers", 2)
    assert code == 0
    assert fed["closed_form"]["bound_by"] == "workers"
    assert fed["simulated"]["period_s"] >= fed["closed_form"]["period_s"] * (1 - 1e-9)
    code, _, err = run("data", *RUN[1:], "--sample-cpu-s", -1)
    assert code == 2
    assert "--sample-cpu-s" in err


def test_steps_by_a_law_fitted_to_own_runs(run, run_json, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("batch,steps\n32,10400\n64,5600\n128,3150\n256,1900\n")
    law = st.fit_batch_law([32, 64, 128, 256], [10_400, 5_600, 3_150, 1_900])
    code, data = run_json(*RUN, "--batch-law", str(path))
    assert code == 0
    assert data["steps"] == math.ceil(law.steps(128))
    code, out, err = run(*RUN, "--batch-law", str(tmp_path / "none.csv"))
    assert (code, out) == (2, "")
    assert "none.csv" in err


def test_spot_devices_are_taken_back_or_it_is_said_that_they_are_not(run_json):
    spot = ("--steps", 2000, "--pricing", "spot", "--usd-per-device-h", 0.2)
    code, calm = run_json(*RUN, *spot)
    assert code == 0
    assert any("never taken back" in line for line in calm["assumptions"])
    _, real = run_json(*RUN, *spot, "--preemption-h", 0.5)
    assert not any("never taken back" in line for line in real["assumptions"])
    assert real["split_s"]["waiting"] > 0
