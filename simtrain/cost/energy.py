"""Energy and money of a step."""

from __future__ import annotations

from simtrain.core.hardware import Device

SOURCE = (
    "energy: idle power plus (board limit - idle) x busy share of the compute stream, hosts added where the cluster states them "
    "(assumption); cost: on-demand price x time (catalog)"
)


def device_energy_j(device: Device, period_s: float, busy_s: float) -> float:
    """Energy of a device over a step: `P_idle T + (P_limit - P_idle) T_busy`.

    Busy time draws the board limit. Memory-bound work draws less, so this is an upper estimate where little is compute-bound.

    Args:
        device: With its power limit and idle power.
        period_s: Step time.
        busy_s: Time that its compute stream works.
    """
    return device.idle_power_w * period_s + (device.power_w - device.idle_power_w) * min(busy_s, period_s)


def device_cost_usd(device: Device, period_s: float) -> float:
    """Price of a device for a step."""
    return device.price_usd_per_hour * period_s / 3600
