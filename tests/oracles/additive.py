"""Bahdanau et al. 2014, appendix A.1.2: one sample."""

import math

from oracles.rows import Matrix, Sees, Vector, apply, dot, everybody, mix, weigh


def additive_map(
    s: Matrix, h: Matrix, w: Matrix, u: Matrix, v: Vector, sees: Sees = everybody
) -> list[list[float]]:
    """e_ij = v · tanh(W s_i + U h_j), α_i = softmax_j."""
    rows = []
    for i, state in enumerate(s):
        scores = []
        for annotation in h:
            inner = [math.tanh(a + b) for a, b in zip(apply(w, state), apply(u, annotation), strict=True)]
            scores.append(dot(v, inner))
        rows.append(weigh(scores, [sees(i, j) for j in range(len(h))]))
    return rows


def additive(
    s: Matrix, h: Matrix, w: Matrix, u: Matrix, v: Vector, sees: Sees = everybody
) -> list[list[float]]:
    """c_i = Σ_j α_ij h_j: the annotations themselves are the values."""
    return [mix(row, h, len(h[0])) for row in additive_map(s, h, w, u, v, sees)]
