"""Katharopoulos et al. 2020, eq. 4-12: one head, one sample; the explicit matrix and the recurrent network."""

import math

from oracles.rows import Matrix, Sees, Vector, dot, everybody


def phi(x: Vector) -> list[float]:
    """elu(x) + 1."""
    return [z + 1 if z > 0 else math.exp(z) for z in x]


def elu_linear(
    q: Matrix, k: Matrix, v: Matrix, sees: Sees = everybody, eps: float = 1e-6
) -> list[list[float]]:
    """Σ_j φ(q_i)·φ(k_j) v_j / (Σ_j φ(q_i)·φ(k_j) + ε)."""
    out = []
    for i, query in enumerate(q):
        weights = [dot(phi(query), phi(key)) if sees(i, j) else 0.0 for j, key in enumerate(k)]
        total = math.fsum(weights) + eps
        out.append(
            [
                math.fsum(w * value[c] for w, value in zip(weights, v, strict=True)) / total
                for c in range(len(v[0]))
            ]
        )
    return out


def recurrent(q: Matrix, k: Matrix, v: Matrix, eps: float = 1e-6) -> list[list[float]]:
    """As a recurrent network: a state (d e) and a normaliser (d), one token after the other, eq. 16-20."""
    d, e = len(k[0]), len(v[0])
    state, norm = [[0.0] * e for _ in range(d)], [0.0] * d
    out = []
    for query, key, value in zip(q, k, v, strict=True):
        for a, feature in enumerate(phi(key)):
            norm[a] += feature
            for c in range(e):
                state[a][c] += feature * value[c]
        features = phi(query)
        below = dot(features, norm) + eps
        out.append([sum(features[a] * state[a][c] for a in range(d)) / below for c in range(e)])
    return out
