"""Measured against predicted: real training, published runs, calibration, errors beside a null model."""
