"""A place in a host where a mechanism is put."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from attnzoo.core.layout import Layout
from attnzoo.errors import RecipeError


@dataclass(frozen=True)
class Site:
    """What a mechanism may know when it is built.

    Args:
        name: Where it is, as recipes address it: `blocks.3`, `decoder.0.cross`.
        dim: Width of the tokens, in channels.
        heads: Number of heads the host asks for.
        layout: Expected arrangement; may differ at run time unless a card says `fixed_length`.
        layer: Index of the layer, from 0.
        depth: Number of layers of the host.
        context_dim: Width of the context, where there is one.
        context_layout: Expected arrangement of the context; None where it is not known to be a grid.
        attn_drop: Dropout of attention weights, a probability.
        proj_drop: Dropout after the output projection, a probability.
        qkv_bias: Whether input projections have a bias.
        proj_bias: Whether the output projection has a bias.
        qk_norm: Whether queries and keys are normalised per head.
        scale_norm: Whether the merged heads are normalised before the output projection.
        rotary: Whether queries and keys are turned by their positions, where there is no context: `layout.turn`.
        norm: Builds a normalisation layer for a width.
        rotation: Heads and channels per head of the rotation that a host brings with each layout; 1 head where it is
            the same for all. None where positions are those of a line.
        qkv_fused: Whether `MultiHead` has one projection of queries, keys and values, or one of each.
        k_bias: Whether keys have a bias where queries and values have one.
        kv_heads: Number of heads of keys and values, each for as many heads of queries, where the projections are not
            fused; None for as many as of queries.
    """

    name: str
    dim: int
    heads: int
    layout: Layout
    layer: int = 0
    depth: int = 1
    context_dim: int | None = None
    context_layout: Layout | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    scale_norm: bool = False
    rotary: bool = False
    norm: Callable[[int], nn.Module] = nn.LayerNorm
    rotation: tuple[int, int] | None = None
    qkv_fused: bool = True
    k_bias: bool = True
    kv_heads: int | None = None

    @property
    def wishes(self) -> frozenset[str]:
        """What is asked of projections beyond what all have: of `qk_norm`, `scale_norm`, `rotary`."""
        return frozenset(wish for wish in ("qk_norm", "scale_norm", "rotary") if getattr(self, wish))

    @property
    def head_dim(self) -> int:
        """Channels per head.

        Raises:
            RecipeError: AZ308, when the heads do not divide the width, or those of keys not those of queries; AZ316,
                when rotary positions find an odd number, or another than the host's.
        """
        if self.heads < 1 or self.dim % self.heads:
            raise RecipeError(
                "AZ308",
                f"{self.heads} heads do not divide a width of {self.dim} at `{self.name}`",
                help=f"choose one of {', '.join(str(h) for h in range(1, 65) if self.dim % h == 0)}",
            )
        size = self.dim // self.heads
        if self.rotary and size % 2:
            raise RecipeError(
                "AZ316",
                f"rotary positions turn pairs of channels; {self.heads} heads of a width of {self.dim} "
                f"have {size} each",
                help="choose heads with an even number of channels, or other `positions`",
            )
        if self.rotation and self.rotation not in ((1, size), (self.heads, size)):
            heads, channels = self.rotation
            own = f"{heads} heads of {channels} channels" if heads > 1 else f"heads of {channels} channels"
            raise RecipeError(
                "AZ316",
                f"the host's rotary positions turn {own}; {self.heads} heads of a width of {self.dim} have {size} each",
                help=f"leave `heads` as the host has them at `{self.name}`, with {channels} channels each",
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise RecipeError(
                "AZ308",
                f"{self.heads} heads of queries cannot share {self.kv_heads} heads of keys at `{self.name}`",
                help=f"choose a multiple of {self.kv_heads}",
            )
        return size

    def key_heads(self, heads: int) -> int:
        """The number of heads of keys: fewer than of queries where the host does not turn each in a way of its own.

        Args:
            heads: Number of heads of keys.

        Raises:
            RecipeError: AZ316.
        """
        if self.rotation and self.rotation[0] > 1 and heads != self.rotation[0]:
            raise RecipeError(
                "AZ316",
                f"the host's rotary positions turn each of {self.rotation[0]} heads in its own way; "
                f"there are {heads} heads of keys at `{self.name}`",
                help="give every head keys of its own, or choose a host whose heads are all turned alike",
            )
        return heads
