"""Array functions, the one place for each shared formula: joins, collectives, energy, money."""
