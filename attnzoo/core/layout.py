"""How tokens are arranged: special tokens first, then a grid."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from attnzoo.core.rotary import Rotation, rotate
from attnzoo.errors import LayoutMismatch


@dataclass(frozen=True)
class Layout:
    """How n tokens are arranged: `prefix` special tokens first, then `grid` in row-major order.

    A sentence is a 1-D grid, an image a 2-D grid, a clip a 3-D grid.

    Args:
        grid: Number of tokens along each dimension, slowest first.
        prefix: Number of special tokens (class token, registers) before the grid.
        rotation: How the host turns queries and keys by their places in the grid; None where it does not, or where
            the tokens are a line. Layouts that differ in it alone are equal.
    """

    grid: tuple[int, ...]
    prefix: int = 0
    rotation: Rotation | None = field(default=None, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Number of tokens in all."""
        return self.prefix + math.prod(self.grid)

    def __str__(self) -> str:
        grid = " × ".join(str(side) for side in self.grid)
        return f"{self.prefix} + {grid} = {self.length}"

    def check(self, x: Tensor) -> None:
        """Refuse tokens that do not fit.

        Args:
            x: (b n c).

        Raises:
            LayoutMismatch: AZ401, when n is not `length`.
        """
        if isinstance(x, fx.Proxy):  # symbolic tracing knows no lengths
            return
        if x.shape[-2] != self.length:
            raise LayoutMismatch(
                "AZ401",
                f"{x.shape[-2]} tokens do not fit {self}",
                why="the layout says how many prefix and grid tokens there are",
                help="hand the mechanism the layout of these very tokens: Layout(grid=..., prefix=...)",
            )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix tokens (b p c) and grid tokens (b prod(grid) c).

        Args:
            x: (b n c).

        Raises:
            LayoutMismatch: AZ401, when n is not `length`.
        """
        self.check(x)
        return x[:, : self.prefix], x[:, self.prefix :]

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Grid tokens (b prod(grid) c) as channels-first (b c *grid)."""
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def from_grid(self, prefix: Tensor, grid: Tensor) -> Tensor:
        """The inverse of `split` followed by `to_grid`.

        Args:
            prefix: (b p c).
            grid: (b c *grid).
        """
        return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)

    def turn(self, x: Tensor, first: int = 0) -> Tensor:
        """Turn queries or keys by their positions: as the host says, or else as those of a line.

        Args:
            x: (b h n d).
            first: Position in the line of the first token.
        """
        return rotate(x, first) if self.rotation is None else self.rotation.turn(x, self.prefix)

    def coords(self, device: torch.device | None = None) -> Tensor:
        """Integer positions of the grid tokens, (prod(grid) len(grid)), in grid steps."""
        axes = [torch.arange(side, device=device) for side in self.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
