"""What is imported when: heavy libraries only where they are used."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "pandas", "scipy.optimize", "matplotlib")


def loaded(code: str) -> set[str]:
    script = f"{code}\nimport sys; print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import simtrain",
        "import simtrain, simtrain.report; simtrain.errors",
        "import simtrain; simtrain.schedule('gpt2-small', '4x rtx-3090', 'data=4,precision=fp16-amp')",
        "import simtrain; simtrain.plan('gpt2-small', '4x rtx-3090', 8, precisions=['fp32'])",
    ],
)
def test_heavy_libraries_stay_unloaded(code: str) -> None:
    assert loaded(code) == set()


def test_the_table_of_contents_holds_what_it_says() -> None:
    import simtrain

    for name in simtrain.__all__:
        assert getattr(simtrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        simtrain.nonsense  # noqa: B018


def test_no_public_function_shares_a_name_with_a_subpackage() -> None:
    import pkgutil

    import simtrain

    subpackages = {m.name for m in pkgutil.iter_modules(simtrain.__path__)}
    assert not {n for n in simtrain.__all__ if callable(getattr(simtrain, n))} & subpackages


def test_no_public_name_of_the_bridge_shares_a_name_with_one_of_its_modules() -> None:
    import pkgutil

    import simtrain.torch as bridge

    assert not set(bridge.__all__) & {m.name for m in pkgutil.iter_modules(bridge.__path__)}
