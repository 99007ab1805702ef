"""Allocation: which devices of a mixed cluster run which layers and which share of each batch.

`prices` (what stages cost) -> `split` (exact cuts of a pipeline) -> `families` (templates worth having) -> `counts` (copies and shares)
-> `search` (all of it, for one cap on gradients after the other) -> `bound` (what no plan can beat). `allocate` asks it of a workload and
a cluster, with prices from the engine (`engine_prices`), places replicas on the fabric (`place`) and has the engine read the plan
(`program`).
"""
