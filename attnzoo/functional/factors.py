"""Numbers as products of two that are near each other."""

import math


def nearest_factors(number: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to each other, the smaller first: 8 × 8 of 64, 12 × 16 of 192."""
    small = max(i for i in range(1, math.isqrt(number) + 1) if number % i == 0)
    return small, number // small
