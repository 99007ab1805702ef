"""The family and its presets, read from `presets.toml`; `spec` gives the numbers of one."""

from __future__ import annotations

from workloads.common.presets import Family
from workloads.transformer.operators import workload
from workloads.transformer.spec import TransformerSpec

FAMILY = Family("transformer", "workloads.transformer", TransformerSpec.from_options, workload, free_length=True)

spec = FAMILY.spec
