"""Model families: the closed form of each, and the real PyTorch module it must equal."""
