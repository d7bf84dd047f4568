"""Hu et al. 2018, eq. 2-4, with biases: one sample."""

import math

from oracles.rows import Matrix, Vector, apply, sigmoid


def gate(grid: Matrix, w1: Matrix, b1: Vector, w2: Matrix, b2: Vector, keep: list[bool]) -> list[float]:
    """σ(W₂ relu(W₁ z + b₁) + b₂), z the mean of the grid tokens that exist."""
    kept = [token for token, yes in zip(grid, keep, strict=True) if yes]
    width = len(grid[0])
    z = [math.fsum(token[c] for token in kept) / max(len(kept), 1) for c in range(width)]
    return [sigmoid(y) for y in apply(w2, [max(y, 0.0) for y in apply(w1, z, b1)], b2)]


def squeeze_excite(
    x: Matrix, prefix: int, w1: Matrix, b1: Vector, w2: Matrix, b2: Vector, keep: list[bool]
) -> list[list[float]]:
    """Every token, special ones too, times the gate."""
    gates = gate(x[prefix:], w1, b1, w2, b2, keep[prefix:])
    return [[value * g for value, g in zip(token, gates, strict=True)] for token in x]
