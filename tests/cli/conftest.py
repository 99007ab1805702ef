import json

import pytest

from simtrain.cli.main import main


@pytest.fixture
def run(capsys):
    """Runs the command line; returns the exit code, standard output and standard error."""

    def call(*argv):
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    """Runs with `--json`; returns the exit code and the one object on standard output."""

    def call(*argv):
        code, out, _ = run(*argv, "--json")
        assert out.startswith("{")
        return code, json.loads(out, parse_constant=_refuse)

    return call


def _refuse(constant):
    raise AssertionError(f"{constant} is no JSON")
