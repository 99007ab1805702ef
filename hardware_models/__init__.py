"""Devices, links and clusters as data, and the formulas that price kernels on each class of device."""
