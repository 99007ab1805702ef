"""One training step in its steady state: from a strategy to a program, and the three readers of it."""
