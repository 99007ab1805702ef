"""Zero bubble: gradients of weights wait until there is nothing more urgent (Qi et al. 2023, arXiv 2401.10241, section 2).

Only the gradient of the input is needed by the stage before. H1 delays the gradients of the weights so that all ranks hold p micro-batches
(1F1B's peak); H2 runs nearly twice as many forward passes first and, where forward, input gradient and weight gradient take equally long,
leaves no rank idle between its first and its last instruction. Bubbles in the paper: (p - 1)(F + B - W) and (p - 1)(F + B - 2 W).
"""

from __future__ import annotations

from dataclasses import dataclass

from simtrain.step.schedules.language import Instruction, Placement, forward, input_gradient, single_placement, weight_gradient


@dataclass(frozen=True, slots=True)
class ZeroBubble:
    """1F1B with a split backward pass.

    Attributes:
        name: In the catalog.
        lead: Forward passes that a rank runs first for each stage behind it, and micro-batches that its weight gradients stay back for
            each stage before it.
        default_chunks: Chunks per rank.
    """

    name: str
    lead: int
    default_chunks: int = 1

    def placement(self, stages: int, chunks: int) -> Placement:
        """One chunk per rank, in order."""
        return single_placement(self.name, stages, chunks)

    def order(self, rank: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:  # noqa: ARG002
        """Warm-up, then forward, input gradient and a delayed weight gradient in turn, then the weight gradients that are left."""
        warm_up, delay = min(self.lead * (stages - 1 - rank), micro_batches), self.lead * rank
        result = [forward(m) for m in range(warm_up)]
        for m in range(micro_batches):
            if m + warm_up < micro_batches:
                result.append(forward(m + warm_up))
            result.append(input_gradient(m))
            if m >= delay:
                result.append(weight_gradient(m - delay))
        return [*result, *(weight_gradient(m) for m in range(max(micro_batches - delay, 0), micro_batches))]


H1 = ZeroBubble("zb-h1", lead=1)
"""1F1B's memory, a third of its bubble where the three parts take equally long."""

H2 = ZeroBubble("zb-h2", lead=2)
"""Nearly twice 1F1B's memory, no bubble where the three parts take equally long."""
