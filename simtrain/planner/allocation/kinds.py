"""Kinds of devices of a cluster: equal devices in equal nodes, told apart where their surroundings or their zone differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from simtrain.core.errors import InputError, UnsupportedError
from simtrain.core.hardware import Cluster, Device
from simtrain.core.precision import DType, precision
from simtrain.core.runtime import Runtime
from simtrain.core.runtimes import runtime as find_runtime
from simtrain.step.buckets import reduced_bytes
from simtrain.step.narrow_check import check_format

SIXTEEN_BIT = (("bf16-amp", DType.BF16), ("fp16-amp", DType.FP16))
"""Recipes with a 16-bit type, the preferred one first."""

LIBRARIES = {"nvidia": "NCCL", "amd": "RCCL"}
"""Collective library of the GPUs of a vendor."""


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Equal devices in equal surroundings.

    Attributes:
        name: The device's, with a number where the same device occurs in several surroundings.
        device: What they are.
        nodes: Ranks of this kind in each node.
        runtime: What carries work out on them.
        precisions: Recipes that its stages may run; each stage takes the one with which it is faster.
    """

    name: str
    device: Device
    nodes: tuple[tuple[int, ...], ...]
    runtime: Runtime
    precisions: tuple[str, ...]

    @property
    def precision(self) -> str:
        """The recipe of a stage that names none."""
        return self.precisions[0]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.nodes))

    @property
    def per_node(self) -> int:
        """Most of them in a node."""
        return max(map(len, self.nodes))


def kinds_of(cluster: Cluster, runtime: Runtime | str | None, recipes: str | Sequence[str] | None) -> tuple[Kind, ...]:
    """Sorts the devices of a cluster into kinds.

    Args:
        cluster: Whose devices.
        runtime: What carries work out; by default eager PyTorch, on CPUs that of CPUs.
        recipes: Precision, or several among which every stage may choose, as far as its device has them; by default the first 16-bit
            recipe that all devices of its class have, else the first that it has, else fp32.

    Raises:
        UnsupportedError: A device lacks the arithmetic of all recipes, or CPUs are mixed with accelerators.
        InputError: Recipes under which replicas would hold gradients or weights in different formats.
    """
    asked = (recipes,) if isinstance(recipes, str) else tuple(dict.fromkeys(recipes or ()))
    on_cpu = {d.device_class == "cpu" for d in cluster.devices}
    if len(on_cpu) > 1:
        raise UnsupportedError(f"{cluster.name}: CPUs and accelerators in one job are not modelled: leave the CPUs out")
    framework = (
        runtime if isinstance(runtime, Runtime) else find_runtime(runtime or ("torch-eager-cpu" if True in on_cpu else "torch-eager"))
    )
    found: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
    group = max(cluster.network.nodes_per_group, 1) if cluster.network.nodes_per_group else len(cluster.nodes)
    rank = 0
    for n, node in enumerate(cluster.nodes):
        for device, run in groupby(node.devices, key=lambda d: d.name):
            ranks = tuple(range(rank, rank + len(list(run))))
            surroundings = (device, node.host_link.name, node.peer_link and node.peer_link.name, node.nic and node.nic.name, node.nics)
            found.setdefault((*surroundings, n // group), []).append(ranks)
            rank += len(ranks)
    devices = {d.name: d for d in cluster.devices}
    names = [str(key[0]) for key in found]
    made = []
    for i, (key, nodes) in enumerate(found.items()):
        device = devices[str(key[0])]
        alike = tuple(d for d in devices.values() if d.device_class == device.device_class)
        own = _able(device, asked) if asked else (_common(alike) or _common((device,)) or "fp32",)
        number = f"#{names[: i + 1].count(names[i])}" if names.count(names[i]) > 1 else ""
        made.append(Kind(f"{device.name}{number}", device, tuple(nodes), framework, own))
    _refuse_sums(made)
    return tuple(made)


def _able(device: Device, recipes: Sequence[str]) -> tuple[str, ...]:
    """Those of the recipes that a device can run."""
    able: list[str] = []
    refused: UnsupportedError | None = None
    for name in recipes:
        try:
            device.peak(precision(name).arithmetic)
            check_format(device, precision(name))
        except UnsupportedError as error:
            refused = error
        else:
            able.append(name)
    if not able and refused is not None:
        raise refused
    return tuple(able)


def _refuse_sums(kinds: Sequence[Kind]) -> None:
    """Refuses a choice of recipes under which replicas would have to sum gradients of one layer in different formats."""
    formats = {
        name: (recipe.parameter, recipe.master, reduced_bytes(recipe, k.runtime))
        for k in kinds
        for name, recipe in ((n, precision(n)) for n in k.precisions)
    }
    first, *rest = formats
    for other in rest if any(len(k.precisions) > 1 for k in kinds) else ():
        if formats[other] != formats[first]:
            raise InputError(
                f"stages in {first} and {other} hold weights or gradients in different formats, which replicas cannot sum: choose among "
                "recipes that store them alike, such as bf16-master and fp8"
            )


def _common(devices: tuple[Device, ...]) -> str | None:
    return next((name for name, dtype in SIXTEEN_BIT if all(dtype in d.peak_flops for d in devices)), None)


@dataclass(frozen=True, slots=True)
class Carrier:
    """What could carry a plan out.

    Attributes:
        executable: Whether anything known can.
        reason: In words.
    """

    executable: bool
    reason: str


def carrier(kinds: tuple[Kind, ...], *, uneven: bool) -> Carrier:
    """What could carry out a job on these kinds together.

    Args:
        kinds: Those that a plan uses.
        uneven: Whether replicas differ in their stages, which asks for a communicator per shared part of a layer.
    """
    devices = {k.device.name: k.device for k in kinds}
    vendors = {d.vendor.lower() for d in devices.values()}
    recipes = {" or ".join(k.precisions) for k in kinds}
    names = " and ".join(sorted(devices))
    if len(devices) == 1:
        only = next(iter(devices.values()))
        if only.device_class in ("gpu", "cpu"):
            return Carrier(True, f"one device type, {only.name}: any framework for it" + _communicators(uneven=uneven))
        return Carrier(False, f"{only.name}: priced under runtime {kinds[0].runtime.name!r}, which does not run there; name one that does")
    if any(d.device_class != "gpu" for d in devices.values()):
        return Carrier(False, f"no runtime is named that runs {names} in one job")
    if len(vendors) > 1 or (vendor := next(iter(vendors))) not in LIBRARIES:
        return Carrier(False, f"{names} share no collective library")
    if len(recipes) > 1:
        return Carrier(False, f"{names} share no 16-bit type: {', '.join(sorted(recipes))}")
    library = LIBRARIES[vendor]
    return Carrier(True, f"{names} share {library} and run {next(iter(recipes))}" + _communicators(uneven=uneven))


def _communicators(*, uneven: bool) -> str:
    return (
        "; replicas differ in their stages, which needs a communicator for every shared range of layers (tried by no framework we know)"
        * uneven
    )
