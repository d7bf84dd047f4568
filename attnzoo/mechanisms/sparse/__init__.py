"""Which few pairs, by content or pattern."""
