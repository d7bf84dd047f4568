"""Lee-Thorp et al. 2021, eq. 3: the double sum, one sample."""

import cmath
import math

from oracles.rows import Matrix


def fourier(x: Matrix, ortho: bool = False) -> list[list[float]]:
    """Re Σ_n Σ_c x[n][c] e^{-2πi (k n / N + l c / C)}."""
    n, c = len(x), len(x[0])
    scale = 1 / math.sqrt(n * c) if ortho else 1.0
    return [
        [
            scale
            * sum(
                x[a][b] * cmath.exp(-2j * math.pi * (row * a / n + column * b / c))
                for a in range(n)
                for b in range(c)
            ).real
            for column in range(c)
        ]
        for row in range(n)
    ]
