"""Nouns of the house: plain frozen data, units, errors and catalogs. Knows no particular device or model."""
