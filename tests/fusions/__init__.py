"""One file for each fusion: hand cases, identities, its oracle, and wrong versions that the oracle catches."""
