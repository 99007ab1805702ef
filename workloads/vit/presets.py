"""The family and its presets, read from `presets.toml`; `spec` gives the numbers of one."""

from __future__ import annotations

from workloads.common.presets import Family
from workloads.vit.operators import workload
from workloads.vit.spec import VitSpec

FAMILY = Family("vision transformer", "workloads.vit", VitSpec.from_options, workload)

spec = FAMILY.spec
