"""Steps until a target: batches and learning rates, data loading, and what happens to a run on the way."""
