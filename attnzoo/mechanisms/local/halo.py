"""Halo attention: blocks of the grid attend to themselves and to a halo around them.

Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", 2021, arXiv:2103.12731, §2.2.
The layers are timm's `HaloAttn`.
"""

import math
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Layout, Mask, Mechanism, NonNegativeInt, Paper, PositiveInt, Site
from attnzoo.functional import einsum, merge_heads, rearrange
from attnzoo.functional.groups import Groups, read_in_groups, special_rows


class Halo(Mechanism):
    """softmax(q kᵀ / √d + q (r_Δy + r_Δx)) v over the (b + 2η)² keys around the b × b block of the query.

    Args:
        site: Where the mechanism is put.
        halo: η, how many tokens beyond its block a window reaches, to each side.
        block: b, the side of a block. The paper's networks, on larger grids, have 8.
        padding: Keys beyond the border: `hidden`, or `zeros`, which take their share of the weights with a score of
            q (r_Δy + r_Δx) and a value of 0, as timm has it. The paper does not say.
        scale_bias: Whether q (r_Δy + r_Δx) is divided by √d too.
    """

    card = Card(
        name="halo",
        family=Family.LOCAL,
        summary="HaloNet: blocks of the grid attend to the window around them, with relative positions.",
        equation="softmax(q kᵀ / √d + q (r_Δy + r_Δx)) v over block and halo",
        paper=Paper(
            "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", "Vaswani et al.", 2021,
            "arXiv:2103.12731", where="§2.2",
        ),
        time="n w c + n c c",
        memory="h n w + n c",
        params="3 * (c + qkv_bias) * c + 2 * (2 * (block + halo) - 1) * d",
        flops="6 * n * c * c + 4 * p * n * c + 4 * prod(ceil(s / block) * block for s in sides) "
        "* (p + (block + 2 * halo)**2 + block + 2 * halo) * c",
        masks={"keys", "causal", "pairs"},
        grid=2,
        honours={"qkv_bias"},
        taps={"scores": "b h x w", "weights": "b h x w"},
        laws={Law.STOCHASTIC, Law.LOCAL},
        notes="Nothing is projected after the heads, as in timm. A grid that blocks do not divide is filled up with "
        "tokens that do not exist. Tables have no rows for distances that no window holds; timm's have 2η. Special "
        "tokens, which are ours, are keys of all blocks and attend to all, with r = 0. Taps show the rows of the grid.",
    )  # fmt: skip

    def __init__(
        self, site: Site, *, halo: NonNegativeInt = 3, block: PositiveInt = 4,
        padding: Literal["hidden", "zeros"] = "hidden", scale_bias: bool = False,
    ):  # fmt: skip
        super().__init__(site)
        from timm.layers.halo_attn import HaloAttn  # here, so that a list does not wait for timm

        self.block, self.halo, self.zeros = block, halo, padding == "zeros"
        self.layers = HaloAttn(
            site.dim, num_heads=site.heads, dim_head=site.head_dim, block_size=block, halo_size=halo,
            qkv_bias=site.qkv_bias, scale_pos_embed=scale_bias,
        )  # fmt: skip
        # r of -(b - 1 + η) ... b - 1 + η; timm's tables have 2 η rows before them, which nothing reads
        tables, shape = self.layers.pos_embed, (2 * (block + halo) - 1, site.head_dim)
        tables.height_rel, tables.width_rel = (nn.Parameter(torch.empty(shape)) for _ in range(2))
        self.init_weights()

    def init_weights(self) -> None:
        """timm's: deviations of c^-½ for the projections, of d^-½ for the tables."""
        self.layers.reset_parameters()

    def reach(self) -> int:
        return self.block - 1 + self.halo

    def mix(self, x, source, *, mask, layout):
        layers, p, tables = self.layers, layout.prefix, self.layers.pos_embed
        groups = Groups(layout.grid, (self.block, self.block))
        q, kv = (F.linear(x, conv.weight.flatten(1), conv.bias) for conv in (layers.q, layers.kv))
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(kv, "b n (h two d) -> two b h n d", h=self.heads, two=2)
        blocks = groups.cut(q[:, :, p:])  # (b h r s d)
        seen = around(x, layout, self.block, self.halo)  # (r p+w)
        near_k, near_v = (F.pad(t, (0, 0, 0, 1))[:, :, seen] for t in (k, v))  # (b h r p+w d); outside is 0
        scaled = blocks * layers.scale if layers.scale_pos_embed else blocks
        bias = relative(scaled, tables.height_rel, tables.width_rel)  # (b h r s w)
        bias = F.pad(bias, (p, 0)) if p else bias
        allowed = visible(seen, groups, p, mask) | (seen < 0)[:, None] & self.zeros
        taps = self.scores, self.weights
        out = read_in_groups(blocks, near_k, near_v, groups=groups, taps=taps, allowed=allowed, bias=bias)
        drop = self.attn_drop if self.training else 0.0
        return merge_heads(torch.cat([special_rows(q[:, :, :p], k, v, mask, drop), out], dim=2) if p else out)


def relative(q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """q (... b² d) by what the tables hold for the distances to each key of its window: (... b² w)."""
    block = math.isqrt(q.shape[-2])
    steps, window = (torch.arange(side, device=q.device) for side in (block, len(rows) + 1 - block))
    at, q = window - steps[:, None] + block - 1, q.unflatten(-2, (block, block))
    y = einsum(q, rows[at], "... i j d, i u d -> ... i j u")
    x = einsum(q, columns[at], "... i j d, j u d -> ... i j u")
    return (y[..., None] + x[..., None, :]).flatten(-2).flatten(-3, -2)


def around(x: Tensor, layout: Layout, block: int, halo: int) -> Tensor:
    """What each block may see, as indices of tokens: special tokens, then its window; -1 is outside. (r p+w)."""
    (rows, columns), p = layout.grid, layout.prefix
    steps = torch.arange(-halo, block + halo, device=x.device)
    i, j = (torch.arange(0, side, block, device=x.device)[:, None] + steps for side in (rows, columns))
    i, j = i[:, None, :, None], j[None, :, None, :]
    inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
    window = torch.where(inside, p + i * columns + j, -1).flatten(0, 1).flatten(1)
    return torch.cat([torch.arange(p, device=x.device).expand(len(window), p), window], dim=1)


def visible(seen: Tensor, groups: Groups, first: int, mask: Mask) -> Tensor:
    """Which of the keys `seen` (r w) queries of blocks may attend to, the grid being from `first` on: (b h r s w)."""
    allowed, keys = (seen >= 0)[None, None, :, None], seen.clamp(min=0)[:, None]
    if mask.free:
        return allowed
    end = first + math.prod(groups.grid)
    queries = groups.cut(torch.arange(first, end, device=seen.device)[:, None])  # (r s 1)
    if mask.keys is not None:
        allowed = allowed & mask.keys[:, None][..., keys]
    if mask.pairs is not None:
        allowed = allowed & mask.pairs[:, :, queries, keys]
    return allowed & (keys <= queries) if mask.causal else allowed


for _name in ("relative", "around", "visible"):
    fx.wrap(_name)  # symbolic tracing cannot ask for a device
