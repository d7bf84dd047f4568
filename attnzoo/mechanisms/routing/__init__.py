"""Which heads, for which token."""
