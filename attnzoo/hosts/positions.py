"""Where a token stands in a sequence, added to its embedding. Rotary positions are turned inside the heads instead."""

import torch
from torch import Tensor, nn

from attnzoo.errors import LayoutMismatch


class Sinusoidal(nn.Module):
    """Fixed positions: sines in the even channels, cosines in the odd ones.

    Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, §3.5.

    Args:
        length: How many positions are made ahead.
        dim: Channels.
    """

    table: Tensor

    def __init__(self, length: int, dim: int):
        super().__init__()
        channel = torch.arange(dim)
        angles = torch.arange(length, dtype=torch.float64)[:, None] / 10_000 ** (2 * (channel // 2) / dim)
        table = torch.where(channel % 2 == 0, angles.sin(), angles.cos())
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """The tokens with their positions.

        Args:
            x: (b n c).
            first: Position of the first token.
        """
        return x + self.table[first : first + x.shape[1]].to(x.dtype)


class Learned(nn.Module):
    """Learnt positions.

    Args:
        length: How many there are.
        dim: Channels.
    """

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, dim))
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02²)."""
        nn.init.normal_(self.table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """The table, as timm leaves its position embeddings."""
        return {"table"}

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """The tokens with their positions; as for `Sinusoidal`."""
        return x + self.table[first : first + x.shape[1]]


class NoPositions(nn.Module):
    """Nothing is added: order shows through masks, through rotary positions, or not at all."""

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """The tokens as they are."""
        return x


def positions(kind: str, length: int, dim: int) -> nn.Module:
    """Positions by name.

    Args:
        kind: `sinusoidal`, `learned`, `rotary` or `none`.
        length: How many.
        dim: Channels.
    """
    if kind == "sinusoidal":
        return Sinusoidal(length, dim)
    return Learned(length, dim) if kind == "learned" else NoPositions()


def check_length(length: int, most: int) -> None:
    """Refuse a sequence that is longer than a model was built for.

    Raises:
        LayoutMismatch: AZ407.
    """
    if length > most:
        raise LayoutMismatch(
            "AZ407",
            f"a sequence of {length} tokens is longer than the {most} that the model was built for",
            help="shorten it, or compose the model with a larger `max_length`",
        )
