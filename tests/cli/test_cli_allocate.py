"""`simtrain allocate` and `simtrain validate allocation`, as a person uses them."""

import json

from simtrain.cli.main import main

ASK = ["allocate", "gpt2-small", "--seq-len", "128", "--cluster", "2x rtx-3090 + 2x v100-sxm2-16gb", "--global-batch", "16"]
QUICK = ["--micro-batch", "2", "--tensor", "1", "--checkpoint", "none"]


def test_table_and_chart(capsys, tmp_path):
    assert main([*ASK, *QUICK, "--timeline", str(tmp_path / "timeline.png")]) == 0
    text = capsys.readouterr().out
    for word in ("no allocation is faster than", "Groups of equal replicas", "What each kind adds", "executable", "Assumed or left out"):
        assert word in text
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_json_holds_plan_bound_and_worth(capsys):
    assert main([*ASK, *QUICK, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert 0 < data["bound_s"] <= data["step_time_s"]
    assert {w["kind"] for w in data["worth"]} == {"RTX3090-24GB", "V100-SXM2-16GB"}
    groups = {s["group"]: s["copies"] * s["micro_batch"] * s["micro_batches"] for s in data["stages"]}
    assert sum(groups.values()) == 16


def test_bad_input_says_what_to_do(capsys):
    assert main(["allocate", "llama3-70b", "--cluster", "2x v100-sxm2-16gb", "--global-batch", "4", *QUICK[2:], "--micro-batch", "1"]) == 1
    assert "fits on no device" in capsys.readouterr().err
    assert main([*ASK, "--micro-batch", "3", *QUICK[2:]]) == 2
    assert "use a multiple of 3" in capsys.readouterr().err
