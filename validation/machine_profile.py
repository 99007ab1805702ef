"""Machine profiles: constants measured on one machine, where and how, in a JSON file that only that machine may use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware_models.measured import MeasuredModel
from hardware_models.operator_table import COLUMNS
from simtrain.core import catalog
from simtrain.core.errors import InputError, UnknownNameError
from simtrain.core.hardware import Device, Provenance, ValueKind
from validation.measurement import Environment
from validation.reference import REFERENCE

FORMAT = 3
BASE_DEVICE = "cpu-core"


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """Constants of this machine's CPU core, or of its GPU, under PyTorch.

    Attributes:
        constants: As `Device.profile` holds them: `gemm.flops_per_s`, ...
        environment: Where and when they were measured.
        steps: Names of the training steps they were fitted to.
        residuals: Time-weighted mean misfit of each class.
        shares: Share of each class in the measured time.
        step_error: Mean absolute relative error of the calibration steps themselves, refitted (not a test).
        framework_launch_s: Time outside operators per launch; contained in each class's launch time. Of a GPU: the host's per launch.
        operator_table: Entries of `hardware_models.operator_table` by class and path.
        null_flops_per_s: FLOP/s of the null model by arithmetic path, one constant for everything, fitted to the same steps.
        data_sheet: Device of the catalog, or its file, that the constants refine.
        reference: The reference workload timed beside the calibration steps (`validation.reference.REFERENCE`); empty without one.
        reference_time_s: Its median, the speed of the machine that all constants are at.
    """

    constants: Mapping[str, float]
    environment: Environment
    steps: tuple[str, ...]
    residuals: Mapping[str, float]
    shares: Mapping[str, float]
    step_error: float
    framework_launch_s: float
    null_flops_per_s: Mapping[str, float]
    operator_table: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    data_sheet: str = BASE_DEVICE
    reference: str = ""
    reference_time_s: float = 0.0

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return bool(self.environment.accelerator)

    @property
    def known_reference_s(self) -> float:
        """Time of the reference workload; 0 for a profile without one, or with another than is timed today."""
        return self.reference_time_s if self.reference == REFERENCE else 0.0

    def device(self) -> Device:
        """Returns the CPU core, or the GPU, with these constants."""
        base = catalog.device(self.data_sheet)
        processor = _identity(self.environment)["processor"]
        source = f"calibration on {processor}, torch {self.environment.torch_version}, {self.environment.date_utc}"
        provenance = dict(base.provenance) | {"profile": Provenance(ValueKind.MEASUREMENT, source)}
        table = {name: np.array(rows, dtype=np.float64).reshape(-1, COLUMNS) for name, rows in self.operator_table.items()}
        memory = base.memory
        reported = int(self.environment.accelerator.get("memory_bytes", 0)) if self.on_gpu else self.environment.memory_bytes
        if reported:
            memory = replace(memory, capacity_bytes=float(reported))
            who = "device memory that the driver" if self.on_gpu else "main memory that the operating system"
            provenance["memory.capacity_bytes"] = Provenance(ValueKind.MEASUREMENT, f"{who} reports")
        return replace(
            base,
            name=f"{base.name} (calibrated)",
            compute_model=MeasuredModel.name if self.on_gpu else base.compute_model,
            aliases=(),
            memory=memory,
            profile=(dict(base.profile) if self.on_gpu else {}) | dict(self.constants),
            operator_table=table,
            provenance=provenance,
        )

    def to_json(self) -> str:
        """Writes the profile; `from_json` reads it back."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "profile") -> MachineProfile:
        """Reads what `to_json` wrote.

        Raises:
            InputError: Not a profile, or one of another format.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") != FORMAT:
                raise InputError(f"{name} has another format than {FORMAT}: run `simtrain calibrate` again")
            data["environment"] = Environment(**data["environment"])
            data["steps"] = tuple(data["steps"])
            data["operator_table"] = {name: tuple(map(tuple, rows)) for name, rows in data["operator_table"].items()}
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{name} is not a machine profile ({error}): run `simtrain calibrate` again") from None


def default_path(device: str = "cpu") -> Path:
    """Returns where profiles are kept: the user's cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("simtrain") / ("machine_profile.json" if device == "cpu" else f"{device}_profile.json")


def probed_path(device: str = "cpu") -> Path:
    """Returns where a profile with probed operators is kept, beside the machine's own."""
    return default_path().with_name("probed_profile.json" if device == "cpu" else f"{device}_probed_profile.json")


def kept_paths() -> dict[str, Path]:
    """Returns where profiles are kept by the name that `profile:...` gives them."""
    gpu = "cuda"
    return {"machine": default_path(), "probed": probed_path(), gpu: default_path(gpu), f"{gpu}-probed": probed_path(gpu)}


def save(profile: MachineProfile, path: Path) -> None:
    """Writes a profile, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.to_json())


def device_readers() -> Mapping[str, Callable[[str], Device]]:
    """Returns the reader of `profile:...`, by which a calibrated or probed machine is named wherever a device is."""
    return {"profile": named_device}


def named_device(text: str) -> Device:
    """Returns the device of a profile; one of another machine or PyTorch says so in what it assumes.

    Args:
        text: "machine" for what `simtrain calibrate` found, "probed" for what `simtrain calibrate --probe` added, "cuda" and
            "cuda-probed" for the same with `--device cuda`, or a file.

    Raises:
        InputError: There is no such profile, or it is broken.
    """
    kept = kept_paths()
    path = kept.get(text) or Path(text)
    if text not in kept and not path.suffix:
        raise UnknownNameError("profile", text, kept)
    profile = read(path)
    device = profile.device()
    return replace(device, name=f"profile:{text}", assumptions=_said_about(profile))


def _said_about(profile: MachineProfile) -> tuple[str, ...]:
    """What a prediction with a profile must say: that it was measured elsewhere."""
    from validation.measure import cpu_model, torch_version

    if profile.on_gpu:  # which GPU is here now, only PyTorch with its driver could say
        measured = ", ".join(f"{what} {then}" for what, then in _identity(profile.environment).items())
        return (f"the profile was measured with {measured}: what is predicted is how long steps take there",)
    now = {"processor": cpu_model(), "PyTorch": torch_version() or "none"}
    away = [f"{what} {then!r} (here: {now[what]!r})" for what, then in _identity(profile.environment).items() if then != now[what]]
    if not away:
        return ()
    return (f"the profile was measured elsewhere, with {' and '.join(away)}: what is predicted is how long steps take there",)


def _identity(environment: Environment) -> dict[str, str]:
    """What has to be the same for measured times to hold."""
    return {"processor": str(environment.accelerator.get("name", environment.cpu_model)), "PyTorch": environment.torch_version}


def read(path: Path) -> MachineProfile:
    """Reads a profile, of whatever machine.

    Raises:
        InputError: No such file, or broken.
    """
    if not path.exists():
        command = "simtrain calibrate" + (" --device cuda" if path in (default_path("cuda"), probed_path("cuda")) else "")
        command += " --probe WORKLOAD" if path in (probed_path(), probed_path("cuda")) else ""
        raise InputError(f"there is no machine profile {path}: run `{command}`")
    try:
        return MachineProfile.from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def load(path: Path, here: Environment) -> MachineProfile:
    """Reads a profile and checks that it belongs to this machine.

    Args:
        path: Of the file.
        here: This machine.

    Raises:
        InputError: No such file, broken, or measured on another machine or with another PyTorch.
    """
    profile, now = read(path), _identity(here)
    for what, then in _identity(profile.environment).items():
        if then != now[what]:
            raise InputError(f"{path} was measured with {what} {then!r}, here it is {now[what]!r}: run `simtrain calibrate`")
    return profile
