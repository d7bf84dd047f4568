"""How queries, keys and values are made."""
