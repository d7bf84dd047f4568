"""Luong et al. 2015, eq. 5-8: one sample."""

import math

from oracles.rows import Matrix, Sees, Vector, apply, dot, everybody, mix, weigh


def dot_score(h: Vector, s: Vector) -> float:
    """h · s."""
    return dot(h, s)


def general_score(h: Vector, s: Vector, w: Matrix) -> float:
    """hᵀ W s."""
    return sum(h[a] * w[a][b] * s[b] for a in range(len(h)) for b in range(len(s)))


def concat_score(h: Vector, s: Vector, w: Matrix, v: Vector) -> float:
    """v · tanh(W [h; s])."""
    return dot(v, [math.tanh(z) for z in apply(w, [*h, *s])])


def attentional(c: Vector, h: Vector, projection: Matrix) -> list[float]:
    """tanh(W_c [c; h]), c first."""
    return [math.tanh(z) for z in apply(projection, [*c, *h])]


def luong_global(
    h: Matrix, s: Matrix, score, projection: Matrix, sees: Sees = everybody
) -> list[list[float]]:
    """a = softmax_s(score(h_t, s)), c = Σ a s, then the attentional vector.

    Args:
        h: Targets.
        s: Sources.
        score: score(t, j) of target t and source j.
        projection: W_c.
        sees: Who sees whom.
    """
    out = []
    for t, target in enumerate(h):
        weights = weigh([score(t, j) for j in range(len(s))], [sees(t, j) for j in range(len(s))])
        out.append(attentional(mix(weights, s, len(s[0])), target, projection))
    return out
