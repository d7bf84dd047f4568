"""What lies between the tokens of a plane, and between the entries of a table: bilinear, held at the border."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Layout
from attnzoo.functional.einops import rearrange


def sample_tokens(tokens: Tensor, at: Tensor, grid: Sequence[int]) -> Tensor:
    """What lies at some points of each group of channels, (b m c), in the dtype of the tokens.

    Args:
        tokens: Those of the grid, in row-major order, (b n c).
        at: The points, rows and columns from the first token, (b g m 2).
        grid: How many rows and columns of tokens there are, (y, x).
    """
    groups, scale = at.shape[1], [2 / max(1, side - 1) for side in grid[::-1]]
    image = rearrange(tokens, "b (y x) (g c) -> (b g) c y x", y=grid[0], g=groups).to(at.dtype)
    where = at.flip(-1).flatten(0, 1)[:, None] * torch.tensor(scale, device=at.device, dtype=at.dtype) - 1
    found = F.grid_sample(image, where, padding_mode="border", align_corners=True)
    return rearrange(found, "(b g) c 1 m -> b m (g c)", g=groups).to(tokens.dtype)


def sample_bias(table: Tensor, at: Tensor, grid: Sequence[int]) -> Tensor:
    """What a table holds for the way from each point to each token, (b h n m); stretched on another grid than its own.

    Args:
        table: By rows and columns of the way, (h 2I-1 2J-1), whose middle is for a token itself.
        at: The points of each group of heads, rows and columns from the first token, (b g m 2).
        grid: How many rows and columns of tokens there are, (y, x).
    """
    (b, g), most = at.shape[:2], [max(1, side - 1) for side in grid[::-1]]
    way = Layout(tuple(grid)).coords(at.device)[:, None] - at[:, :, None]  # (b g n m 2)
    way = way.flip(-1) / torch.tensor(most, device=at.device, dtype=at.dtype)
    tables = table.to(at.dtype).unflatten(0, (g, -1)).expand(b, -1, -1, -1, -1).flatten(0, 1)
    found = F.grid_sample(tables, way.flatten(0, 1), padding_mode="border", align_corners=True)
    return found.unflatten(0, (b, g)).flatten(1, 2)
