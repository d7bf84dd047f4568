"""How many times faster attention to windows can be than attention of all to all: bounds that no kernel passes.

Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light", 2025,
arXiv:2504.16922: the analysis of tiles. The authors' simulator is not public; this is written after its description.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnzoo.core import OptionError
from attnzoo.functional import Windows
from attnzoo.functional.neighbours import windows_along

Each = int | Sequence[int]
"""A number for all dimensions, or one for each."""


@dataclass(frozen=True)
class Bounds:
    """How many times less there is to do.

    Args:
        flops: Pairs of all tokens, over pairs of a token and a key of its window.
        tiles: Pairs of tiles of queries and keys, over those that are visited.
    """

    flops: float
    tiles: float


def window_bounds(
    grid: Sequence[int], window: Each, *, stride: Each = 1, dilation: Each = 1, causal: bool = False,
    queries: Each = 64, keys: Each = 64, moving: bool = False,
) -> Bounds:  # fmt: skip
    """Of `neighborhood` with these options, by a kernel that works on tiles of queries and of keys.

        window_bounds((32,), 8, stride=4, queries=4, keys=4)     # flops=4.0, tiles=2.91
        window_bounds((30, 48), 12, queries=(8, 8), keys=(8, 8))

    A tile of queries visits the tiles of keys that touch the box around all of its windows, along every dimension.
    Where strides are multiples of the queries of a tile, windows of its keys, and windows begin where tiles do,
    nothing is visited in vain: both bounds are alike.

    Args:
        grid: Sides, in tokens.
        window: Side of the window; a shorter grid side is seen whole.
        stride: Neighbouring queries that share a window.
        dilation: Step between the tokens of a window; tiles are of tokens of one group.
        causal: Whether windows end with their query.
        queries: Tokens of a tile of queries: its sides, or how many neighbours on the line of all tokens, row by row.
        keys: The same of keys; sides where those of queries are.
        moving: Whether tiles of keys begin where a box does; otherwise at multiples of their sides.

    Raises:
        OptionError: AZ214, for numbers below 1, as many as there are no dimensions, a stride longer than the window,
            or a dilation on the line of all tokens.
    """
    lined = len(grid) > 1 and isinstance(queries, int) and isinstance(keys, int)
    sides, windows, strides, dilations = (_each(t, len(grid)) for t in (grid, window, stride, dilation))
    if lined and max(dilations) > 1:
        raise OptionError(
            "tokens of one group do not lie beside each other on the line of all tokens",
            help=f"give tiles a side for each of the {len(grid)} dimensions: queries=(8, 8)",
        )
    axes = [_groups(side) for side in windows_along(sides, [*windows], [*strides], [*dilations], causal)]
    pairs = math.prod(sum(end - start for group in axis for start, end in group) for axis in axes)
    if lined:
        axes, sides = [[_on_a_line(axes, sides)]], (math.prod(sides),)
    many, of = _each(queries, len(axes)), _each(keys, len(axes))
    visited = math.prod(
        sum(_visited(group, q, k, moving) for group in axis)
        for axis, q, k in zip(axes, many, of, strict=True)
    )
    tiles = math.prod(-(-n // q) * -(-n // k) for n, q, k in zip(sides, many, of, strict=True))
    return Bounds(math.prod(sides) ** 2 / pairs, tiles / visited)


def _each(value: Each, count: int) -> tuple[int, ...]:
    """A number for each dimension."""
    found = (value,) * count if isinstance(value, int) else tuple(value)
    if len(found) != count or min(found, default=0) < 1:
        raise OptionError(
            f"{value} is not a number for each of {count} dimensions, 1 at least",
            help="give one number for all, or as many as the grid has sides",
        )
    return found


def _groups(windows: Windows) -> list[list[tuple[int, int]]]:
    """Start and end of each token's window, in its group, group by group."""
    start, end = (t.tolist() for t in windows.bounds(torch.arange(windows.length)))
    return [
        list(zip(start, end, strict=True))[group :: windows.dilation] for group in range(windows.dilation)
    ]


def _on_a_line(axes: list[list[list[tuple[int, int]]]], sides: Sequence[int]) -> list[tuple[int, int]]:
    """First key of each token's window on the line of all tokens, and the one after its last."""
    steps = [math.prod(sides[i + 1 :]) for i in range(len(sides))]
    return [
        (
            sum(step * start for step, (start, _) in zip(steps, box, strict=True)),
            sum(step * (end - 1) for step, (_, end) in zip(steps, box, strict=True)) + 1,
        )
        for box in itertools.product(*(group for axis in axes for group in axis))
    ]


def _visited(bounds: Sequence[tuple[int, int]], queries: int, keys: int, moving: bool) -> int:
    """Tiles of keys that all tiles of queries of a line visit."""
    total = 0
    for first in range(0, len(bounds), queries):
        starts, ends = zip(*bounds[first : first + queries], strict=True)
        low, high = min(starts), max(ends)
        total += -(-(high - low) // keys) if moving else -(-high // keys) - low // keys
    return total
