"""Scores by a small network."""
