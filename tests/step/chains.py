"""Chains of layers for tests of recomputation."""

import numpy as np

from simtrain.step.remat_optimal import Chain


def chain(n: int, seed: int, *, recomputable: bool = True) -> Chain:
    random = np.random.default_rng(seed)

    def draw(low: int, high: int):
        return random.integers(low, high, n).astype(float)

    forward_s, saved, x = draw(1, 9), draw(0, 12), draw(1, 5)
    dropping = draw(1, 9)
    return Chain(
        forward_s=forward_s,
        last_s=forward_s * random.choice([0.5, 1.0], n),
        input_bytes=x,
        output_gradient_bytes=draw(1, 5),
        saved_bytes=saved,
        keeps_input=random.random(n) < 0.7,
        forward_peak_bytes=saved + dropping,
        dropping_peak_bytes=dropping,
        backward_peak_bytes=draw(1, 12),
        left_bytes=draw(0, 3),
        recomputable=np.ones(n, dtype=bool) if recomputable else random.random(n) < 0.8,
        until_loss_bytes=np.zeros(n),
        dropping_until_loss_bytes=np.zeros(n),
    )


def uniform(n: int, *, saved: float = 4.0, x: float = 1.0) -> Chain:
    one, none = np.ones(n), np.zeros(n)
    return Chain(one, one, x * one, x * one, saved * one, one > 0, saved * one, none, none, none, one > 0, none, none)
