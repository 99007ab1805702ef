"""What one rank runs, and ledgers of a strategy, whatever the device: memory depends on the runtime only."""

import simtrain as st
from simtrain.core.precision import precision
from simtrain.core.runtime import Runtime
from simtrain.core.strategy import Strategy
from simtrain.core.workload import Form, Workload
from simtrain.step.layout import Layout, lay_out
from simtrain.step.ledger import Ledger, ledger
from simtrain.step.setting import Setting


def layout(workload: Workload, strategy: Strategy, runtime: Runtime) -> Layout:
    cluster = st.cluster(f"{strategy.ranks}x a100-sxm-80g")
    return lay_out(Setting(workload, cluster, strategy, precision(strategy.precision), runtime, cluster.devices[: strategy.ranks]))


def ledger_of(workload: Workload, strategy: Strategy, runtime: Runtime, stage: int = 0) -> Ledger:
    laid = layout(workload, strategy, runtime)
    return ledger(laid.setting, laid.by_stage[stage][0], laid.plan)


def form(whole: Workload, **options: object) -> Workload:
    """What one rank runs."""
    assert whole.reform is not None
    return whole.reform(Form(**options))


def flops(work: Workload, batch: int = 2) -> float:
    return sum(op.flops(batch, work.sequence) * x.repeats for x in work.layers for op in x.forward + x.backward)
