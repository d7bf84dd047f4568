"""Which channels, rather than which tokens."""
