"""Rotary positions: channels are turned by an angle that grows with the position.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864, §3.2.2, eq. 15.
"""

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
