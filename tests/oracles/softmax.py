"""Vaswani et al. 2017, eq. 1: one head, one sample."""

import math

from oracles.rows import Matrix, Sees, dot, everybody, mix, weigh


def softmax(q: Matrix, k: Matrix, v: Matrix, sees: Sees = everybody) -> list[list[float]]:
    """softmax(q_i · k_j / √d) over j, times v_j, for every query i."""
    out = []
    for i, query in enumerate(q):
        scores = [dot(query, key) / math.sqrt(len(query)) for key in k]
        weights = weigh(scores, [sees(i, j) for j in range(len(k))])
        out.append(mix(weights, v, len(v[0])))
    return out
