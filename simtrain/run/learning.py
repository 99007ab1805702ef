"""Finds the loss law of a run: published or one's own, and what compression or rare synchronisation leaves of it."""

from __future__ import annotations

from collections.abc import Sequence

from simtrain.core.errors import InputError, UnknownNameError, UnsupportedError
from simtrain.run.course import Learning, Target
from simtrain.run.loss_laws import KAPLAN_NOISE, LOSS_LAWS, LossLaw, NoiseGrowth
from simtrain.run.state_price import PriceBook


def find_learning(
    book: PriceBook,
    until: Target,
    law: LossLaw | str | None = None,
    noise: NoiseGrowth | None = KAPLAN_NOISE,
    parameters: float | None = None,
    inexact: Sequence[str] = (),
    efficiency: float | None = None,
) -> Learning | None:
    """Finds what a loss needs: its law, the model's size, the noise scale and what is lost where gradients are not exchanged whole.

    Args:
        book: Knows the workload.
        until: When the run is done.
        law: Published, by name, or one's own; "chinchilla" for a target loss.
        noise: How the noise scale grows; `None` takes every batch to be far below it.
        parameters: Of the model; the workload's by default.
        inexact: For each phase, how it exchanges less than every step's gradients ("" if it does not).
        efficiency: What that leaves of a token.

    Returns:
        `None` if no loss is asked for.

    Raises:
        InputError: Unknown names, or no number of parameters.
        UnsupportedError: A law that is not of this kind of workload, or an effect that must be stated.
    """
    share = _efficiency(efficiency, inexact, until, law)
    if law is None and until.loss is None:
        return None
    if isinstance(law, str) and law not in LOSS_LAWS:
        raise UnknownNameError("loss law", law, LOSS_LAWS)
    chosen = LOSS_LAWS[law or "chinchilla"] if law is None or isinstance(law, str) else law
    if book.workload is not None and book.workload.sample_unit != "sequence" and chosen in LOSS_LAWS.values():
        raise UnsupportedError(f"the published loss laws are of language models; give a LossCurve of {book.workload.name}'s own")
    size = parameters if parameters is not None else book.workload.parameter_count if book.workload is not None else None
    if size is None or not size > 0:
        raise InputError(f"the loss law needs the number of parameters: give parameters=..., above zero (given: {size!r})")
    return Learning(chosen, float(size), noise, share)


def _efficiency(given: float | None, inexact: Sequence[str], until: Target, law: LossLaw | str | None) -> float:
    """The effect on convergence of exchanging less than every step's gradients; published laws need it stated.

    Raises:
        InputError: Out of range, or given where it has no effect.
        UnsupportedError: Needed and not given, or not the same in all phases.
    """
    named = next(filter(None, inexact), "")
    learns = until.loss is not None or law is not None
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
            raise InputError(f"efficiency is a share of tokens above 0 and at most 1, not {given!r}")
        if not named or not learns:
            missing = "the strategy has neither" if not named else "no loss is asked for"
            raise InputError(f"efficiency={given!r} is what compression or low_communication leave of a loss law's tokens, but {missing}")
        if not all(inexact):
            raise UnsupportedError(f"efficiency is one for the whole run, but only some phases have {named}: give it to all or none")
        return float(given)
    published = law is None or isinstance(law, str) or law in LOSS_LAWS.values()
    if named and learns and published:
        raise UnsupportedError(
            f"what {named} does to convergence is not modelled, so no published loss law holds: give efficiency=... (tokens that would "
            "bring as much with every step's gradients, over tokens processed; 1 for no loss), a law of your own, or a target of steps or "
            "tokens"
        )
    return 1.0
