"""Small questions with made-up prices."""

import numpy as np

from simtrain.planner.allocation.prices import LayerPrices, Market, Unit


def prices(passes_s, *, gradient=1.0, fixed=1.0, kept=1.0, spare=1e9):
    passes = np.asarray(passes_s, dtype=float)
    ones = np.ones_like(passes)
    return LayerPrices(
        passes / 3, passes * 2 / 3, passes, 0.0 * ones, gradient * ones, fixed * ones, kept * np.broadcast_to(ones, passes.shape), spare
    )


def market(table, counts, global_batch, *, send_s=0.0, synchronise_s=0.0, node_devices=8, **more):
    """Prices by (kind, width, micro-batch)."""
    return Market(
        counts=counts,
        prices={(Unit(kind, width), size): price for (kind, width, size), price in table.items()},
        send_s=lambda a, b, size, together: 0.0 if together else send_s,
        synchronise_s=lambda load, replicas, kinds: synchronise_s * load,
        global_batch=global_batch,
        node_devices=dict.fromkeys(counts, node_devices),
        **more,
    )
