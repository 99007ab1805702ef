"""The family and its presets, read from `presets.toml`; `spec` gives the numbers of one."""

from __future__ import annotations

from workloads.common.presets import Family
from workloads.convnet.operators import workload
from workloads.convnet.spec import ConvNetSpec

FAMILY = Family("convolutional network", "workloads.convnet", ConvNetSpec.from_options, workload)

spec = FAMILY.spec
