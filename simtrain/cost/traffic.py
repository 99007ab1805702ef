"""What a collective sends: messages between ranks, traffic to and from switches that add up, and the latency that no rate shortens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from simtrain.core.polynomial import FloatArray
from simtrain.core.program import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Flows:
    """Bytes from ranks to other ranks.

    Attributes:
        source: Rank that sends, of each flow.
        target: Rank that receives.
        size_bytes: How much in all.
    """

    source: IntArray
    target: IntArray
    size_bytes: FloatArray

    def where(self, mask: NDArray[Any]) -> Flows:
        """Returns the flows at which `mask` holds."""
        return Flows(self.source[mask], self.target[mask], self.size_bytes[mask])


@dataclass(frozen=True, slots=True, eq=False)
class SwitchFlows:
    """What each rank (or each rank's node) sends to a switch that adds up, and receives from it.

    Attributes:
        ranks: Which ranks; with `between_nodes`, the nodes of these ranks.
        out_bytes: Each sends.
        in_bytes: Each receives.
        between_nodes: Through the network's switches, not the node's own.
    """

    ranks: IntArray
    out_bytes: float
    in_bytes: float
    between_nodes: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """All that one group sends at a time.

    Attributes:
        flows: Between ranks.
        switch_flows: To and from switches.
    """

    flows: tuple[Flows, ...] = ()
    switch_flows: tuple[SwitchFlows, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How an algorithm carries out a collective.

    Attributes:
        algorithm: Its name.
        phases: What is sent, one after the other; what can be pipelined is one phase.
        latency_s: Part of the duration that no rate shortens.
        rate_share: Share of the links' rate that the algorithm sustains.
        ramp_s: What messages too large for the protocols of low latency take longer to start and to pass each hop.
    """

    algorithm: str
    phases: tuple[Traffic, ...]
    latency_s: float
    rate_share: float = 1.0
    ramp_s: float = 0.0
