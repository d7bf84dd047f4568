"""What all loops share: vectors as lists of numbers, and a softmax over those who are seen."""

import math
from collections.abc import Callable, Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]
Sees = Callable[[int, int], bool]
"""Whether query i may attend to key j."""


def everybody(i: int, j: int) -> bool:
    """No mask."""
    return True


def dot(a: Vector, b: Vector) -> float:
    """Sum of products."""
    assert len(a) == len(b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def apply(weight: Matrix, x: Vector, bias: Vector | None = None) -> list[float]:
    """W x + b; row o of W makes output o, as in `nn.Linear`."""
    out = [dot(row, x) for row in weight]
    return out if bias is None else [y + b for y, b in zip(out, bias, strict=True)]


def transposed(matrix: Matrix) -> list[list[float]]:
    """Rows as columns."""
    return [list(column) for column in zip(*matrix, strict=True)]


def weigh(scores: Vector, seen: Sequence[bool]) -> list[float]:
    """e^s / Σ e^s over the entries that are seen, 0 for the others; all 0 when nothing is seen."""
    if not any(seen):
        return [0.0] * len(scores)
    top = max(s for s, yes in zip(scores, seen, strict=True) if yes)
    powers = [math.exp(s - top) if yes else 0.0 for s, yes in zip(scores, seen, strict=True)]
    total = math.fsum(powers)
    return [p / total for p in powers]


def mix(weights: Vector, values: Matrix, width: int) -> list[float]:
    """Σ_j w_j v_j."""
    return [math.fsum(w * value[c] for w, value in zip(weights, values, strict=True)) for c in range(width)]


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x))
