"""simtrain: how should this model be trained on these machines, what will it take, and how sure are we?

This module is the table of contents; everything is imported on first use, so that `import simtrain` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simtrain import report, torch
    from simtrain.core import errors
    from simtrain.core.catalog import cluster, device, link, workload
    from simtrain.core.hardware import Cluster, Device
    from simtrain.core.result import Result
    from simtrain.core.runtime import Runtime, runtime
    from simtrain.core.strategy import Strategy
    from simtrain.core.workload import Workload
    from simtrain.planner.search import Plan, plan
    from simtrain.step.predict import estimate, schedule, simulate

_HOME = {
    "Cluster": "simtrain.core.hardware",
    "Device": "simtrain.core.hardware",
    "Plan": "simtrain.planner.search",
    "Result": "simtrain.core.result",
    "Runtime": "simtrain.core.runtime",
    "Strategy": "simtrain.core.strategy",
    "Workload": "simtrain.core.workload",
    "cluster": "simtrain.core.catalog",
    "device": "simtrain.core.catalog",
    "errors": "simtrain.core",
    "estimate": "simtrain.step.predict",
    "link": "simtrain.core.catalog",
    "plan": "simtrain.planner.search",
    "report": "simtrain",
    "runtime": "simtrain.core.runtime",
    "schedule": "simtrain.step.predict",
    "simulate": "simtrain.step.predict",
    "torch": "simtrain",
    "workload": "simtrain.core.catalog",
}

__version__ = "0.1.0"
__all__ = [
    "Cluster",
    "Device",
    "Plan",
    "Result",
    "Runtime",
    "Strategy",
    "Workload",
    "cluster",
    "device",
    "errors",
    "estimate",
    "link",
    "plan",
    "report",
    "runtime",
    "schedule",
    "simulate",
    "torch",
    "workload",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'simtrain' has no attribute {name!r}")
    home = _HOME[name]
    value = import_module(f"{home}.{name}") if name in ("errors", "report", "torch") else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
