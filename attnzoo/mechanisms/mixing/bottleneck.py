"""Attention of bottleneck transformers: scores by content and by the way from query to key, in rows and in columns.

Srinivas et al., "Bottleneck Transformers for Visual Recognition", 2021, arXiv:2101.11605, §3. The layers are timm's
`BottleneckAttn`.
"""

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site
from attnzoo.functional import attention_from_scores, einsum, merge_heads, rearrange


class Bottleneck(Mechanism):
    """softmax(q kᵀ / √d + q (r_Δy + r_Δx)ᵀ / √d) v over all places of the grid; all heads have one r.

    Args:
        site: Where the mechanism is put.
        scale_bias: Whether q (r_Δy + r_Δx)ᵀ is divided by √d too, as by the authors; timm does not.
    """

    card = Card(
        name="bottleneck",
        family=Family.MIXING,
        summary="BoTNet: softmax attention with scores for the way from query to key, by rows and columns.",
        equation="softmax(q kᵀ / √d + q (r_Δy + r_Δx)ᵀ / √d) v",
        paper=Paper(
            "Bottleneck Transformers for Visual Recognition",
            "Srinivas et al.",
            2021,
            "arXiv:2101.11605",
            where="§3, fig. 4",
        ),
        time="n m c + n c c",
        memory="h n m + n c",
        params="3 * (c + qkv_bias) * c + 2 * (sum(sides) - 1) * d",
        flops="6 * n * c * c + 4 * n * n * c + 2 * (n - p) * sum(sides) * c",
        masks={"keys", "causal", "pairs"},
        grid=2,
        honours={"qkv_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC},
        notes="Nothing is projected after the heads: in the paper the block's next convolution does that. Special "
        "tokens, which are ours, ask and are asked with r = 0. On another grid than it was built for, the tables of r "
        "are resized.",
    )

    def __init__(self, site: Site, *, scale_bias: bool = True):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.layers.bottleneck_attn import BottleneckAttn

        y, x = site.layout.grid
        self.layers = BottleneckAttn(
            site.dim,
            feat_size=(y, x),
            num_heads=site.heads,
            dim_head=site.head_dim,
            qkv_bias=site.qkv_bias,
            scale_pos_embed=scale_bias,
        )

    def init_weights(self) -> None:
        """timm's: deviations of c^-½ for the projection, of d^-½ for the tables."""
        self.layers.reset_parameters()

    def mix(self, x, source, *, mask, layout):
        layers, p, n = self.layers, layout.prefix, x.shape[1]
        made = layers.qkv(x.mT[..., None])[..., 0]
        q, k, v = rearrange(made, "b (three h d) n -> three b h n d", three=3, h=self.heads)
        scaled, tables = q * layers.scale, layers.pos_embed
        bias = ways(
            (scaled if layers.scale_pos_embed else q)[:, :, p:],
            table_for(layout.grid[0], tables.height_rel),
            table_for(layout.grid[1], tables.width_rel),
            layout.grid,
        )
        scores = scaled @ k.mT + F.pad(bias, (p, 0, p, 0))
        return merge_heads(attention_from_scores(self, scores, v, mask.dense(n, n, x.device)))


def table_for(side: int, table: Tensor) -> Tensor:
    """Rows of a table (2 s - 1, d) for the ways along `side` places, (2 side - 1, d): between its ends, linearly."""
    if len(table) == 2 * side - 1:
        return table
    return F.interpolate(table.T[None], 2 * side - 1, mode="linear", align_corners=True)[0].T


def ways(q: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    """q (b h y*x d) by what the tables hold for the way to each place: (b h y*x y*x)."""
    at = [torch.arange(side, device=q.device) for side in grid]
    down, right = (steps - steps[:, None] + len(steps) - 1 for steps in at)
    q = q.unflatten(2, grid)
    y = einsum(q, rows[down], "b h i j d, i u d -> b h i j u")
    x = einsum(q, columns[right], "b h i j d, j w d -> b h i j w")
    return (y[..., None] + x[..., None, :]).flatten(-2).flatten(2, 3)


fx.wrap("ways")  # symbolic tracing cannot ask for a device
