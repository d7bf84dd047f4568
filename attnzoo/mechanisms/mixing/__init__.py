"""Mixing that ignores content."""
