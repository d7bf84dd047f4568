"""A plane of tokens cut into windows, and put together again."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.functional.einops import rearrange


def windows(t: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
    """The tokens of a plane by window, (... y*x e) -> (... r w e): r windows of w = i j places, both row by row.

    Windows that would reach beyond the grid are filled up with zeros; of a boolean that is True for every token, with
    False, so that it says which places hold one: `windows(there[..., None], grid, sides)`.

    Args:
        t: What the tokens of the grid have, in row-major order, (... y*x e).
        grid: How many rows and columns of tokens there are, (y, x).
        sides: How many rows and columns a window has, (i, j); they need not divide the grid.
    """
    (y, x), (i, j) = grid, sides
    t = t.unflatten(-2, (y, x))
    if y % i or x % j:
        t = F.pad(t, (0, 0, 0, -x % j, 0, -y % i))
    return rearrange(t, "... (y i) (x j) e -> ... (y x) (i j) e", i=i, j=j)


def unwindows(t: Tensor, grid: Sequence[int], sides: Sequence[int], heads: bool = False) -> Tensor:
    """The inverse of `windows`, (... r w e) -> (... y*x e): what was filled up is left out.

    Args:
        t: What the places of the windows have, (... r w e).
        grid: How many rows and columns of tokens there are, (y, x).
        sides: How many rows and columns a window has, (i, j).
        heads: Whether t is (b h r w e) and heads shall lie beside channels in memory, so that merging copies nothing.
    """
    (y, x), (i, j) = grid, sides
    if heads:
        t = rearrange(t, "b h (y x) (i j) e -> b (y i) (x j) h e", y=-(-y // i), i=i, j=j)
        return t[:, :y, :x].flatten(1, 2).transpose(1, 2)
    t = rearrange(t, "... (y x) (i j) e -> ... (y i) (x j) e", y=-(-y // i), i=i, j=j)
    return t[..., :y, :x, :].flatten(-3, -2)


def surroundings(t: Tensor, grid: Sequence[int], side: int, step: int = 1, circular: bool = False) -> Tensor:
    """What lies around each token of a plane, by tap of a square kernel: (... y*x e) -> (... y*x e w), w = (2s + 1)².

    Args:
        t: What the tokens of the grid have, in row-major order, (... y*x e).
        grid: How many rows and columns of tokens there are, (y, x).
        side: s, how many taps there are to each side of a token.
        step: How many tokens lie between one tap and the next, itself included.
        circular: Whether what lies beyond the border is that of the opposite one; zeros, or False, otherwise.
    """
    far, t = side * step, t.unflatten(-2, tuple(grid))
    if circular:
        y, x = ([i % of for i in range(-far, of + far)] for of in grid)
        t = t[..., y, :, :][..., x, :]
    else:
        t = F.pad(t, (0, 0, far, far, far, far))
    taps = t.unfold(-3, 2 * far + 1, 1).unfold(-3, 2 * far + 1, 1)[..., ::step, ::step]  # (... y x e s' s')
    return taps.flatten(-2).flatten(-4, -3)


def relative_bias(table: Tensor, sides: Sequence[int]) -> Tensor:
    """What a table holds for the way from each place of a window to each other, (h w w), w = i j.

    Args:
        table: By rows and columns of the way, (h 2I-1 2J-1), whose middle is for a place itself.
        sides: How many rows and columns the window has, (i, j), I and J at most.
    """
    (i, j), (y, x) = sides, (table.shape[1] // 2, table.shape[2] // 2)
    near = table[:, y - i + 1 : y + i, x - j + 1 : x + j]  # the ways that there are, (h 2i-1 2j-1)
    ways = near.unfold(1, i, 1).unfold(2, j, 1)  # at [y, x, s, u] row y + s, the way from i - 1 - s to y
    return ways.flip(3, 4).flatten(3).flatten(1, 2)


class Patches(NamedTuple):
    """A plane as r windows of w places, of which there are so many that chunks are full.

    Args:
        grid: How many rows and columns of tokens there are, (y, x).
        sides: How many rows and columns a window has, (i, j); they need not divide the grid.
        chunk: How many places a chunk has; w is the least multiple of it that is i j or more.
        roll: Whether windows are shifted by half their sides, around the edges of the plane.
    """

    grid: tuple[int, int]
    sides: tuple[int, int]
    chunk: int
    roll: bool

    def cut(self, t: Tensor) -> Tensor:
        """(b h y*x e) -> (b h r w e); places without a token are filled up with zeros, those of chunks last."""
        t = windows(self._rolled(t, -1), self.grid, self.sides)
        return F.pad(t, (0, 0, 0, -math.prod(self.sides) % self.chunk))

    def join(self, t: Tensor) -> Tensor:
        """The inverse of `cut`, (b h r w e) -> (b h y*x e)."""
        return self._rolled(unwindows(t[..., : math.prod(self.sides), :], self.grid, self.sides), 1)

    def _rolled(self, t: Tensor, sign: int) -> Tensor:
        y, x = (sign * self.roll * (side // 2) for side in self.sides)
        return t.unflatten(2, self.grid).roll((y, x), (2, 3)).flatten(2, 3)


def by_distance(table: Tensor, side: int) -> Tensor:
    """What a table holds for the way from key to query of a line, (w w e); ways beyond it are its longest.

    Args:
        table: A row for each way, (2I-1 e), whose middle is for a token itself.
        side: How many tokens the line has, w.
    """
    at, middle = torch.arange(side, device=table.device), table.shape[0] // 2
    return table[(middle + at[:, None] - at).clamp(0, 2 * middle)]
