"""What docs/adding_a_device.md says happens."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hardware_models.reading import read_device
from simtrain.core import catalog
from simtrain.core.errors import UnsupportedError
from simtrain.step.predict import schedule

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "adding_a_device.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.S)
(DEVICE,) = (block for kind, block in BLOCKS if kind == "toml" and block.startswith("name"))
(ENTRY,) = (block for kind, block in BLOCKS if kind == "toml" and block.startswith("[project"))
(CLASS,) = (block for kind, block in BLOCKS if kind == "python")
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work(command, tmp_path):
    (tmp_path / "example.toml").write_text(DEVICE)
    program = Path(sys.executable).parent / "simtrain"
    done = subprocess.run([program, *shlex.split(command)[1:]], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example-80GB" in done.stdout or "example.toml" in done.stdout


def test_a_measured_constant_replaces_that_of_the_class(tmp_path):
    (line,) = re.findall(r"`(profile\.[^`]+)`", TEXT)
    (tmp_path / "example.toml").write_text(DEVICE + line + "\n")
    device = read_device(tmp_path / "example.toml")
    assert device.profile == {"bandwidth_hbm": 0.93}
    assert "measured bandwidth_hbm" in catalog.compute_model("gpu").sources(device)[0]


def test_a_class_of_ones_own_prices_a_step(tmp_path, monkeypatch):
    path = tmp_path / "photonic.py"
    path.write_text(CLASS)
    spec = importlib.util.spec_from_file_location("photonic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert ENTRY.strip().endswith('"my_package.photonic:compute_models"')
    items = catalog._items("simtrain.compute_models")
    monkeypatch.setitem(items, "photonic", module.compute_models()["photonic"])
    catalog._by_folded.cache_clear()
    settings = re.findall(r"`((?:device_class|compute_model|architecture\.\w+) = [^`]+)`", TEXT)
    assert len(settings) == 2
    text = re.sub(r"(device_class|compute_model) = .*\n", "", DEVICE)
    own = tmp_path / "own.toml"
    own.write_text("\n".join(settings) + "\n" + text)
    try:
        result = schedule(catalog.workload("resnet18"), f"1x {own}", "micro_batch=8,precision=bf16-amp")
        assert 0 < result.mfu < 0.5
        with pytest.raises(UnsupportedError, match="no photonic scatter"):
            schedule(catalog.workload("gpt2-small", seq_len=64), f"1x {own}", "micro_batch=1,precision=bf16-amp")
    finally:
        catalog._by_folded.cache_clear()


def test_the_table_of_classes_is_complete():
    rows = re.findall(r"^\| `(\w+)`[^|]*\| `(\w+)` \|", TEXT, flags=re.M)
    assert {model for _, model in rows} == set(catalog.names("compute_models"))
    assert {name for name, _ in rows} == {catalog.device(d).device_class for d in catalog.names("devices")}
