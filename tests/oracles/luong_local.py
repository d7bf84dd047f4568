"""Luong et al. 2015, §3.2, eq. 9-10, positions counted from 0: one sample."""

import math

from oracles.luong_global import attentional
from oracles.rows import Matrix, Sees, Vector, apply, dot, everybody, mix, sigmoid, weigh


def aligned(target: Vector, w: Matrix, v: Vector, length: float) -> float:
    """p_t = S σ(v · tanh(W h_t))."""
    return length * sigmoid(dot(v, [math.tanh(z) for z in apply(w, target)]))


def local_map(scores: Vector, p: float, window: int, seen: list[bool], gaussian: bool) -> list[float]:
    """Softmax inside [p - D, p + D]; with the Gaussian of σ = D/2, not normalised again."""
    inside = [yes and p - window <= j <= p + window for j, yes in enumerate(seen)]
    weights = weigh(scores, inside)
    if not gaussian:
        return weights
    sigma = window / 2
    return [w * math.exp(-((j - p) ** 2) / (2 * sigma**2)) for j, w in enumerate(weights)]


def luong_local(
    h: Matrix,
    s: Matrix,
    score,
    positions: Vector,
    window: int,
    gaussian: bool,
    projection: Matrix,
    sees: Sees = everybody,
) -> list[list[float]]:
    """Windowed attention around `positions`, then the attentional vector."""
    out = []
    for t, target in enumerate(h):
        scores = [score(t, j) for j in range(len(s))]
        weights = local_map(scores, positions[t], window, [sees(t, j) for j in range(len(s))], gaussian)
        out.append(attentional(mix(weights, s, len(s[0])), target, projection))
    return out
