"""Attention inside windows of a grid, as a map of the whole grid.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021, arXiv:2103.14030, §3.2: the
grid is rolled by the shift, cut into windows, and rolled back.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Layout

OUTSIDE = -1
"""In the place of a token where a window reaches beyond the grid."""


@dataclass(frozen=True)
class Windows:
    """How a grid is cut into windows, as timm's Swin does it.

    Args:
        grid: Rows and columns of tokens.
        size: Rows and columns of a window. Where they do not divide the grid, it is filled up below and to the right.
        shift: By how many rows and columns the windows are shifted.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        """How many windows there are."""
        return math.prod(-(-side // size) for side, size in zip(self.grid, self.size, strict=True))

    @property
    def whole(self) -> bool:
        """Whether no window reaches beyond the grid."""
        return self.count * math.prod(self.size) == math.prod(self.grid)

    def tokens(self, device: torch.device | None = None) -> Int[Tensor, "w n"]:
        """Which tokens of the grid are in each window, and `OUTSIDE` where there is none, (w n).

        Args:
            device: Where.
        """
        (rows, columns), (height, width) = self.grid, self.size
        grid = torch.arange(rows * columns, device=device).view(rows, columns)
        rolled = grid.roll((-self.shift[0], -self.shift[1]), (0, 1))
        full = F.pad(rolled, (0, -columns % width, 0, -rows % height), value=OUTSIDE)
        cut = full.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # (rows height columns width)
        return cut.transpose(1, 2).flatten(2).flatten(0, 1)

    def fold(self, weights: Float[Tensor, "b*w h n n"]) -> Float[Tensor, "b h y*x y*x"]:
        """What each token of the grid receives of each other, 0 where they share no window.

        Rows keep their sums; where windows reach beyond the grid, less what goes there.

        Args:
            weights: Of each window of each image, all windows of the first image first, (b·w h n n).
        """
        length, tokens = math.prod(self.grid), self.tokens(weights.device)
        tokens = tokens.where(tokens != OUTSIDE, length)  # a row and a column that are cut off
        weights = weights.unflatten(0, (-1, self.count)).transpose(1, 2)  # (b h w n n)
        out = weights.new_zeros(*weights.shape[:2], length + 1, length + 1)
        out[:, :, tokens[:, :, None], tokens[:, None, :]] = weights
        return out[:, :, :length, :length]


@dataclass(frozen=True)
class InWindows(Layout):
    """Tokens of a window, and of which windows it is one.

    Args:
        windows: Of the whole grid; None where the attention was called by itself, and nobody knows.
    """

    windows: Windows | None = None
