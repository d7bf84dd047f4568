"""Ainslie et al. 2023: query head h reads group ⌊h G / H⌋; one sample, all heads."""

from oracles.rows import Matrix, Sees
from oracles.softmax import softmax


def grouped_query(
    q: list[Matrix], k: list[Matrix], v: list[Matrix], sees: list[Sees]
) -> list[list[list[float]]]:
    """Heads (h n d) of queries on groups (g m d) of keys and values."""
    heads, groups = len(q), len(k)
    return [softmax(q[h], k[h * groups // heads], v[h * groups // heads], sees[h]) for h in range(heads)]
