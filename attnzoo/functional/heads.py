"""Tokens to heads and back; channels are head-major."""

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b n h*d) -> (b h n d)."""
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(b h n d) -> (b n h*d)."""
    b, h, n, d = x.shape
    return x.transpose(1, 2).reshape(b, n, h * d)
