"""Fusions of k branch vectors of one token."""

import math

from oracles.rows import Matrix, Vector, apply, mix, weigh


def low_rank(
    branches: Matrix, down: list[tuple[Matrix, Vector]], up: tuple[Matrix, Vector], tanh: bool
) -> list[float]:
    """Kim et al. 2017: P (σ(U₁ s₁ + b₁) ∘ ... ∘ σ(U_k s_k + b_k)) + b."""
    product = [1.0] * len(down[0][0])
    for branch, (weight, bias) in zip(branches, down, strict=True):
        projected = apply(weight, branch, bias)
        product = [p * (math.tanh(y) if tanh else y) for p, y in zip(product, projected, strict=True)]
    return apply(up[0], product, up[1])


def difference(branches: Matrix, share: Vector) -> list[float]:
    """s₁ - λ Σ_{i>1} s_i, λ per channel."""
    out = list(branches[0])
    for branch in branches[1:]:
        out = [o - share[c] * branch[c] for c, o in enumerate(out)]
    return out


def gated(branches: Matrix, x: Vector, weight: Matrix, bias: Vector) -> list[float]:
    """Σ_i g_i s_i, g = softmax(W x + b)."""
    shares = weigh(apply(weight, x, bias), [True] * len(branches))
    return mix(shares, branches, len(branches[0]))


def concat(branches: Matrix, weight: Matrix) -> list[float]:
    """W [s₁; ...; s_k]."""
    return apply(weight, [value for branch in branches for value in branch])
