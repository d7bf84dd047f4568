"""Tokens to heads and back, channels being head-major; and a small network of each head."""

import torch
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b n h*d) -> (b h n d)."""
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(b h n d) -> (b n h*d)."""
    b, h, n, d = x.shape
    return x.transpose(1, 2).reshape(b, n, h * d)


class MLPByHead(nn.Module):
    """W₂ relu(W₁ x + b₁) + b₂, with parameters of each head: (b h n width), or (b 1 n width) for all, to (b h n out).

    Args:
        heads: h.
        width: Channels of x.
        hidden: Channels in between.
        out: Channels that come out.
    """

    def __init__(self, heads: int, width: int, hidden: int, out: int):
        super().__init__()
        self.first = nn.Parameter(torch.empty(heads, width, hidden))
        self.first_bias = nn.Parameter(torch.empty(heads, hidden))
        self.second = nn.Parameter(torch.empty(heads, hidden, out))
        self.second_bias = nn.Parameter(torch.empty(heads, out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / √fan-in."""
        for name, parameter in self.named_parameters():
            bound = (self.first if "first" in name else self.second).shape[1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(b h n out), of x (b h n width) or (b 1 n width)."""
        hidden = x @ self.first + self.first_bias[:, None]
        return hidden.relu() @ self.second + self.second_bias[:, None]
