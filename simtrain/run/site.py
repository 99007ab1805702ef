"""Where a run happens: facility overhead, network power, carbon intensity and prices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simtrain.core.errors import InputError, UnknownNameError
from simtrain.run.checks import above_zero, not_negative

J_PER_KWH = 3.6e6
PRICINGS = ("on-demand", "spot", "reserved")

CARBON_SOURCE = (
    "carbon intensity of electricity generation in 2023 (Iceland and United Arab Emirates 2022), yearly average of the country: "
    "codecarbon 3.3.2, data/private_infra/global_energy_mix.json, from Our World in Data (Ember)"
)
CARBON_G_PER_KWH: dict[str, float] = {
    "australia": 548.692,
    "brazil": 98.348,
    "canada": 170.043,
    "china": 582.317,
    "finland": 79.158,
    "france": 56.039,
    "germany": 380.95,
    "iceland": 27.68,
    "india": 713.441,
    "ireland": 290.805,
    "japan": 485.392,
    "netherlands": 267.622,
    "norway": 30.08,
    "poland": 661.926,
    "singapore": 470.783,
    "south-korea": 430.567,
    "spain": 174.05,
    "sweden": 40.695,
    "switzerland": 34.843,
    "taiwan": 642.378,
    "united-arab-emirates": 561.135,
    "united-kingdom": 237.589,
    "united-states": 369.473,
}
"""Grams of CO2 equivalent per kWh; see `CARBON_SOURCE`."""


@dataclass(frozen=True, slots=True)
class Site:
    """What turns seconds and watts into carbon and money.

    Attributes:
        pue: Power usage effectiveness: facility energy over that of devices, hosts and network. 1 counts no overhead.
        network_w_per_device: Power of switches and optics per device.
        region: Where, for the carbon intensity; one of `CARBON_G_PER_KWH`.
        carbon_g_per_kwh: One's own intensity; overrides the region's.
        pricing: "on-demand", "spot" or "reserved".
        usd_per_device_h: Price; the catalog's on-demand price if not given. Spot and reserved need it.
        reserved_h: Hours that are paid for in any case ("reserved"); longer runs pay the rest at the same price.
    """

    pue: float = 1.0
    network_w_per_device: float = 0.0
    region: str | None = None
    carbon_g_per_kwh: float | None = None
    pricing: Literal["on-demand", "spot", "reserved"] = "on-demand"
    usd_per_device_h: float | None = None
    reserved_h: float | None = None

    def __post_init__(self) -> None:
        not_negative(self, "network_w_per_device", "carbon_g_per_kwh", "usd_per_device_h")
        above_zero(self, "reserved_h")
        if not self.pue >= 1:
            raise InputError(f"Site: pue is the facility's energy over that of its machines, 1 or more, not {self.pue!r}")
        if self.region is not None and self.region not in CARBON_G_PER_KWH:
            raise UnknownNameError("region", self.region, CARBON_G_PER_KWH)
        if self.pricing not in PRICINGS:
            raise UnknownNameError("pricing", str(self.pricing), PRICINGS)
        if self.pricing != "on-demand" and self.usd_per_device_h is None:
            raise InputError(f"Site: pricing {self.pricing!r} needs usd_per_device_h; the catalogs hold on-demand prices only")
        if self.pricing != "on-demand" and not self.usd_per_device_h:
            raise InputError(f"Site: usd_per_device_h must be above zero with pricing {self.pricing!r}: nobody lends devices for nothing")
        if (self.pricing == "reserved") != (self.reserved_h is not None):
            raise InputError("Site: reserved_h belongs to pricing 'reserved', and is needed there")

    @property
    def intensity_g_per_kwh(self) -> float | None:
        """Carbon intensity, if known."""
        if self.carbon_g_per_kwh is not None:
            return self.carbon_g_per_kwh
        return CARBON_G_PER_KWH[self.region] if self.region else None

    def carbon_kg(self, energy_j: float) -> float | None:
        """Carbon of energy (facility overhead included in it), if the intensity is known."""
        intensity = self.intensity_g_per_kwh
        return None if intensity is None else energy_j / J_PER_KWH * intensity / 1000

    def assumptions(self) -> tuple[str, ...]:
        """What is left out or assumed, in words."""
        lines = []
        if self.pue == 1:
            lines.append("PUE 1: cooling and power distribution of the facility are not counted; give Site(pue=...)")
        if self.network_w_per_device == 0:
            lines.append("power of network switches is not counted; give Site(network_w_per_device=...)")
        if self.intensity_g_per_kwh is None:
            lines.append("carbon is not stated: give Site(region=...) or Site(carbon_g_per_kwh=...)")
        return tuple(lines)
