"""Machine profiles: constants measured on one machine, where and how, in a JSON file that only that machine may use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware_models.operator_table import COLUMNS
from simtrain.core import catalog
from simtrain.core.errors import InputError
from simtrain.core.hardware import Device, Provenance, ValueKind
from validation.measurement import Environment

FORMAT = 3
BASE_DEVICE = "cpu-core"


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """Constants of this machine's CPU core under PyTorch.

    Attributes:
        constants: As `Device.profile` holds them: `gemm.flops_per_s`, ...
        environment: Where and when they were measured.
        steps: Names of the training steps they were fitted to.
        residuals: Time-weighted mean misfit of each class.
        shares: Share of each class in the measured time.
        step_error: Mean absolute relative error of the calibration steps themselves, refitted (not a test).
        framework_launch_s: Time outside operators per launch; contained in each class's launch time.
        operator_table: Entries of `hardware_models.operator_table` by class and path.
        null_flops_per_s: FLOP/s of the null model by arithmetic path, one constant for everything, fitted to the same steps.
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

    def device(self) -> Device:
        """Returns the CPU core with these constants."""
        base = catalog.device(BASE_DEVICE)
        source = f"calibration on {self.environment.cpu_model}, torch {self.environment.torch_version}, {self.environment.date_utc}"
        provenance = dict(base.provenance) | {"profile": Provenance(ValueKind.MEASUREMENT, source)}
        table = {name: np.array(rows, dtype=np.float64).reshape(-1, COLUMNS) for name, rows in self.operator_table.items()}
        named = f"{BASE_DEVICE} (calibrated)"
        return replace(base, name=named, aliases=(), profile=dict(self.constants), operator_table=table, provenance=provenance)

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


def default_path() -> Path:
    """Returns where profiles are kept: the user's cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("simtrain") / "machine_profile.json"


def probed_path() -> Path:
    """Returns where a profile with probed operators is kept, beside the machine's own."""
    return default_path().with_name("probed_profile.json")


def save(profile: MachineProfile, path: Path) -> None:
    """Writes a profile, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.to_json())


def load(path: Path, here: Environment) -> MachineProfile:
    """Reads a profile and checks that it belongs to this machine.

    Args:
        path: Of the file.
        here: This machine.

    Raises:
        InputError: No such file, broken, or measured on another machine or with another PyTorch.
    """
    if not path.exists():
        raise InputError(f"there is no machine profile {path}: run `simtrain calibrate`")
    profile = MachineProfile.from_json(path.read_text(), str(path))
    for what, then, now in (
        ("processor", profile.environment.cpu_model, here.cpu_model),
        ("PyTorch", profile.environment.torch_version, here.torch_version),
    ):
        if then != now:
            raise InputError(f"{path} was measured with {what} {then!r}, here it is {now!r}: run `simtrain calibrate`")
    return profile
