"""Rotary positions: channels are turned by an angle that grows with the position.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864, §3.2.2, eq. 15.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Turn the channel pairs (2i, 2i + 1) at position p by p θ_i, θ_i = 10000^{-2i/d}.

    The product of two turned vectors depends on the distance of their positions only.

    Args:
        x: Queries or keys (b h n d), d even.
        first: Position of the first token.
    """
    n, d = x.shape[-2:]
    exact = torch.promote_types(x.dtype, torch.float32)  # angles lose digits in half precision
    theta = BASE ** (-torch.arange(0, d, 2, device=x.device, dtype=exact) / d)
    angles = torch.arange(first, first + n, device=x.device, dtype=exact)[:, None] * theta
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., 0::2].to(exact), x[..., 1::2].to(exact)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a host turns queries and keys in one forward, where their positions are not those of a line.

    Args:
        table: Sines and, behind them, cosines for each token of the grid; broadcasts against (b h n 2d).
        half: Whether channels i and i + d/2 are a pair; 2i and 2i + 1 are otherwise.
    """

    table: Tensor
    half: bool = False

    def turn(self, x: Tensor, prefix: int) -> Tensor:
        """Turn the tokens of the grid.

        Args:
            x: Queries or keys (b h n d).
            prefix: Number of special tokens before the grid, which have no position.
        """
        special, grid = x[:, :, :prefix], x[:, :, prefix:]
        sin, cos = self.table.chunk(2, dim=-1)
        if self.half:
            a, b = grid.chunk(2, dim=-1)
            across = torch.cat([-b, a], dim=-1)
        else:
            across = torch.stack([-grid[..., 1::2], grid[..., 0::2]], dim=-1).flatten(-2)
        # angles lose digits in half precision, so the product is cast, not its factors
        return torch.cat([special, (grid * cos + across * sin).to(x.dtype)], dim=2)
