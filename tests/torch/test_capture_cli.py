"""`simtrain capture FILE.py:FUNCTION`, and `capture:FILE.py:FUNCTION` as the name of a workload."""

import json

import pytest

from simtrain.cli.main import main

FILE = """
import torch
from torch import nn
import torch.nn.functional as F
from workloads.transformer.module import Transformer, example_batch
from workloads.transformer.presets import spec

NUMBERS = spec("gpt", layers=2, hidden=48, heads=4, vocabulary=101, max_positions=64, sequence=32)

def build():
    return lambda: Transformer(NUMBERS), example_batch(NUMBERS, 2)

def network():
    batch = (torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))
    return {"model": nn.Linear(8, 3), "batch": batch, "loss": lambda output, b: F.cross_entropy(output, b[1]), "name": "tiny"}

def breaks():
    raise RuntimeError("no data today")

def half():
    return nn.Linear(8, 3)

def misspelt():
    return {"modle": nn.Linear(8, 3), "batch": torch.zeros(1)}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_models.py"
    path.write_text(FILE)
    return path


def run(capsys, *argv):
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table(file, capsys) -> None:
    code, out, _ = run(capsys, "capture", f"{file}:build")
    assert code == 0
    assert "my_models" in out
    assert "blocks" in out
    assert f"captured from {file}:build" in " ".join(out.split())


def test_json_and_file(file, capsys, tmp_path) -> None:
    code, out, _ = run(capsys, "capture", f"{file}:network", "--json", "--out", tmp_path / "tiny.json")
    assert code == 0
    (shown,) = json.loads(out)["workloads"]
    assert shown["name"] == "tiny"
    assert shown["parameter_count"] == 27
    written = json.loads((tmp_path / "tiny.json").read_text())
    assert [op["kind"] for op in written["layers"][0]["forward"]].count("gemm") == 1


def test_predictions_take_it(file, capsys) -> None:
    argv = ("--cluster", "2x rtx-3090", "--strategy", "data=2,micro_batch=4,precision=bf16-amp", "--json")
    code, out, _ = run(capsys, "predict", f"capture:{file}:build", "--seq-len", "64", *argv)
    assert code == 0
    options = "layers=2,hidden=48,heads=4,vocabulary=101,max_positions=64,sequence=32"
    from simtrain import schedule
    from simtrain.core.catalog import workload

    numbers = {k: int(v) for k, v in (pair.split("=") for pair in options.split(","))}
    closed = schedule(workload("gpt", **numbers | {"sequence": 64}), "2x rtx-3090", "data=2,micro_batch=4,precision=bf16-amp")
    assert json.loads(out)["step_time_s"] == pytest.approx(closed.step_time_s, rel=1e-2)


REFUSED = {
    "my_modles.py:build": r"there is no file .*my_modles.py: did you mean 'my_models.py'?",
    "my_models.py:biuld": "has no function 'biuld': did you mean 'build'?",
    "my_models.py:breaks": "failed: RuntimeError: no data today",
    "my_models.py:half": "returned a Linear: expected (model, batch)",
    "my_models.py:misspelt": "an unknown key 'modle'",
    "my_models.py": "is not of the form FILE.py:FUNCTION",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said(file, capsys, name: str) -> None:
    code, _, err = run(capsys, "capture", file.parent / name)
    assert code == 2
    head, _, tail = REFUSED[name].partition(".*")
    assert head in err
    assert tail in err


def test_a_broken_file_and_a_length_that_means_nothing(file, capsys, tmp_path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    code, _, err = run(capsys, "capture", f"{broken}:build")
    assert code == 2
    assert "cannot be imported: ModuleNotFoundError" in err
    code, _, err = run(capsys, "capture", f"{file}:network", "--seq-len", "64")
    assert code == 2
    assert "no sequence dimension" in err
