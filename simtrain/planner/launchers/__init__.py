"""Handing a strategy over: written in the form of a launcher, read back from it, and what that form cannot say is named.

| launcher | written as |
|---|---|
| `megatron` | arguments of Megatron-LM's `pretrain_gpt.py` |
| `torchtitan` | TOML of torchtitan (releases up to 0.2) |
| `deepspeed` | JSON of DeepSpeed |
| `fsdp2` | Python that shards a model with PyTorch's `fully_shard` |
| `torchrun` | the command that starts the ranks |
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from simtrain.core.errors import UnknownNameError, UnsupportedError
from simtrain.core.runtime import Runtime
from simtrain.core.runtimes import runtime as find_runtime
from simtrain.core.strategy import Strategy
from simtrain.planner.launchers.form import Job, Written

CARRIED: dict[str, tuple[str, ...]] = {
    "megatron": ("megatron", "megatron-local", "megatron-2021"),
    "torchtitan": ("fsdp2",),
    "deepspeed": ("deepspeed",),
    "fsdp2": ("fsdp2",),
    "torchrun": ("torch-eager", "torch-eager-cpu"),
}
"""Runtimes whose behaviour each launcher's program has; the first is what it is planned with unless another is named."""

LAUNCHERS = tuple(CARRIED)


def check_launcher(name: str, option: str = "launcher") -> None:
    """Checks a launcher's name.

    Raises:
        UnknownNameError: With the nearest.
    """
    if name not in LAUNCHERS:
        raise UnknownNameError(option, name, LAUNCHERS)


def launchers_of(runtime: str) -> tuple[str, ...]:
    """The launchers whose programs behave like a runtime."""
    return tuple(name for name, runtimes in CARRIED.items() if runtime in runtimes)


def runtimes_of(launcher: str, usual: Sequence[Runtime]) -> list[Runtime]:
    """What a plan for a launcher is made with: those of the usual runtimes that it carries out, or else its own first."""
    return [r for r in usual if r.name in CARRIED[launcher]] or [find_runtime(CARRIED[launcher][0])]


def emit(launcher: str, strategy: Strategy, job: Job | None = None) -> Written:
    """Writes a strategy for a launcher.

    Args:
        launcher: One of `LAUNCHERS`.
        strategy: What to carry out.
        job: Nodes, model and runtime, where the launcher must know.

    Raises:
        UnknownNameError: No such launcher.
        UnsupportedError: The strategy states its replicas in full.
    """
    module = _module(launcher)
    if strategy.plan:
        raise UnsupportedError(
            "launchers know equal replicas only; a strategy with an explicit plan of replicas cannot be written for them"
        )
    written: Written = module.write(strategy, job or Job())
    back: Strategy = module.read(written.text, strategy.ranks)
    unsaid = dict(written.unsaid)
    for name in Strategy.__dataclass_fields__:
        if getattr(back, name) != getattr(strategy, name):
            unsaid.setdefault(name, f"{name}={getattr(strategy, name)} would be read back as {getattr(back, name)}")
    return Written(written.text, unsaid)


def read(launcher: str, text: str, *, ranks: int | None = None) -> Strategy:
    """Reads a launcher's configuration as a strategy; what it does not say stays at its default.

    Args:
        launcher: One of `LAUNCHERS`.
        text: What `emit` or a person wrote.
        ranks: Devices in all, where the text does not say.

    Raises:
        UnknownNameError: No such launcher.
        InputError: The text cannot be read, or the ranks are needed.
    """
    strategy: Strategy = _module(launcher).read(text, ranks)
    return strategy


def _module(launcher: str) -> ModuleType:
    check_launcher(launcher)
    return import_module(f"simtrain.planner.launchers.{launcher}")


__all__ = ["CARRIED", "LAUNCHERS", "Job", "Written", "check_launcher", "emit", "launchers_of", "read", "runtimes_of"]
