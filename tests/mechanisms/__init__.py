"""One file for each mechanism: hand cases, identities, its oracle, and wrong versions that the oracle catches."""
