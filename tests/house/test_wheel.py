"""The wheel, installed without torch in an empty environment outside the checkout, predicts."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_predicts_in_an_empty_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT), cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("simtrain-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    constraints = str(ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints, str(wheel), cwd=tmp_path)
    command = str(tmp_path / "env" / "bin" / "simtrain")
    strategy = "data=4,micro_batch=4,precision=fp16-amp"
    printed = run(command, "predict", "gpt2-small", "--cluster", "4x rtx-3090", "--strategy", strategy, "--json", cwd=tmp_path)
    assert json.loads(printed)["step_time_s"] > 0
    assert "not installed" in run(command, "show-env", cwd=tmp_path)
    missing = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert missing.returncode != 0
