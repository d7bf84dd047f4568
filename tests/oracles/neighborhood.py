"""Generalized neighborhood attention, arXiv:2504.16922: who sees whom, token by token."""

import itertools


def window_of(
    i: int, length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> list[int]:
    """The keys of token i along one dimension."""
    group = [j for j in range(length) if j % dilation == i % dilation]
    a, members = group.index(i), len(group)
    window = min(window, members)
    left, right = window // 2, window - 1 - window // 2
    if causal:
        leader = min((a // stride) * stride + stride - 1, members - 1)
        start, end = max(leader - window + 1, 0), a + 1
    else:
        leader = min((a // stride) * stride + stride // 2, members - 1)
        start = max(leader - left, 0)
        if leader + right >= members:
            start = members - window
        end = start + window
    return group[start:end]


def pairs(grid: tuple[int, ...], prefix: int, **options) -> list[list[bool]]:
    """Who sees whom on a grid: windows in every dimension; special tokens see all and are seen by all."""
    places = list(itertools.product(*(range(side) for side in grid)))
    seen = [[True] * (prefix + len(places)) for _ in range(prefix + len(places))]
    for i, here in enumerate(places):
        boxes = [set(window_of(at, side, **options)) for at, side in zip(here, grid, strict=True)]
        for j, there in enumerate(places):
            seen[prefix + i][prefix + j] = all(at in box for at, box in zip(there, boxes, strict=True))
    return seen
