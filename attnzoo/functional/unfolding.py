"""A plane cut into windows that overlap, and put together again by sums."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def unfolded(image: Tensor, side: int, stride: int) -> Tensor:
    """Windows that overlap, around every s-th row and column: (b c y x) -> (b c*w r); beyond the border are zeros.

    Args:
        image: What the places of a plane have, (b c y x).
        side: Rows and columns of a window, of which (side - 1) // 2 lie before its middle; w = side².
        stride: s; r = ⌈y / s⌉ ⌈x / s⌉.
    """
    (y, x), before = image.shape[2:], (side - 1) // 2
    below, beside = _covered((y, x), side, stride)
    image = F.pad(image, (before, beside - before - x, before, below - before - y))
    return F.unfold(image, side, stride=stride)


def folded(t: Tensor, grid: Sequence[int], side: int, stride: int) -> Tensor:
    """What the windows of `unfolded` have, each at its place and summed where they overlap: (b c*w r) -> (b c y x).

    Args:
        t: What the places of the windows have, (b c*w r).
        grid: How many rows and columns there are, (y, x).
        side: Rows and columns of a window.
        stride: s.
    """
    (y, x), before = grid, (side - 1) // 2
    image = F.fold(t, _covered(grid, side, stride), side, stride=stride)
    return image[:, :, before : before + y, before : before + x]


def _covered(grid: Sequence[int], side: int, stride: int) -> tuple[int, ...]:
    """Rows and columns that all windows of `unfolded` cover together."""
    return tuple((-(-of // stride) - 1) * stride + side for of in grid)


def at_places(like: Tensor, grid: Sequence[int], side: int, stride: int) -> Tensor:
    """Which token lies at each place of each window of `unfolded`, counted from 1, or 0: (r w).

    Args:
        like: Is where the answer is wanted.
        grid: How many rows and columns of tokens there are, (y, x).
        side: Rows and columns of a window.
        stride: s.
    """
    numbers = torch.arange(1, grid[0] * grid[1] + 1, device=like.device, dtype=torch.float32)
    return unfolded(numbers.reshape(1, 1, *grid), side, stride)[0].mT.long()
