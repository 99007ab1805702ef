"""Two real processes that really compute and send do what the fake rank does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torch.real_ranks import RANKS, WAYS, summary
from tests.torch.test_ranks import run

ROOT = Path(__file__).parents[2]


def test_real_processes_do_the_same(tmp_path: Path) -> None:
    outputs = [tmp_path / f"{rank}.json" for rank in range(RANKS)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.torch.real_ranks"]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(output)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank, output in enumerate(outputs)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, errors
    for rank, output in enumerate(outputs):
        real = json.loads(output.read_text())
        for how in WAYS:
            job = run(how, tensor=RANKS, rank=rank) if "tensor" in how else run(how, RANKS, rank=rank)
            peak, sent = summary(job.recording, job.collectives)
            assert sent == real[how][1], (how, rank)
            assert peak == pytest.approx(real[how][0], rel=2e-3)
