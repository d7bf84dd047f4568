"""Spatial reduction: keys and values are of a smaller grid, made by a strided convolution or a pool.

Wang et al., "PVT v2", 2022, arXiv:2106.13797, §3.2; "Pyramid Vision Transformer", 2021, arXiv:2102.12122, §3.3. The
layers are timm's.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mask, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import existing, multi_head_attention, windows

POOLED = 7
"""Side of the grid that the linear form pools to."""


class SpatialReduction(Mechanism):
    """P softmax(W_q x (W_k u)ᵀ / √d) W_v u, u = norm(conv(x)) of squares of tokens, or gelu(norm(W pool(x))).

    Args:
        site: Where the mechanism is put.
        ratio: R, side of the squares of tokens that a convolution makes one of; 1 for none, u = x. None takes 2.
        linear: Whether u is of 7 × 7 means instead, whatever the grid: the linear form of PVT v2.

    Raises:
        OptionError: AZ214, when a `ratio` is given beside `linear`.
    """

    card = Card(
        name="spatial_reduction",
        family=Family.LINEAR,
        summary="PVT's attention: every token reads from a smaller grid, of a strided convolution or 7 × 7 means.",
        equation="P softmax(W_q x (W_k u)ᵀ / √d) W_v u\nu = norm(conv(x))",
        paper=Paper(
            "PVT v2: Improved Baselines with Pyramid Vision Transformer",
            "Wang et al.",
            2022,
            "arXiv:2106.13797",
            where="§3.2",
        ),
        time="n m c + n c c",
        memory="h n m + n c",
        params="(4 * c + 3 * qkv_bias + 1) * c + ((ratio or 2)**2 * c + 3) * c",
        flops="4 * n * c * c + 2 * prod(ceil(s / (ratio or 2)) for s in sides) * (ratio or 2)**2 * c * c"
        " + 4 * (c + n) * (p + prod(ceil(s / (ratio or 2)) for s in sides)) * c",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias"},
        taps={"scores": "b h n r", "weights": "b h n r"},
        laws={Law.STOCHASTIC},
        notes="P, the convolution and W always have biases. There are n / R² keys. A grid that R does not divide is "
        "filled up with zeros; the authors leave the last rows and columns out. Tokens that do not exist are zeros to "
        "the convolution and have no part in means; squares and bins without any are not read. Special tokens ask, and "
        "are asked as they are. The paper takes ratios of 8, 4, 2 and 1, stage by stage.",
    )

    @classmethod
    def claims(cls, *, ratio: int | None, linear: bool, **options) -> Card:
        if linear:
            return replace(
                cls.card,
                time="n r c + n c c",
                memory="h n r + n c",
                params="(4 * c + 3 * qkv_bias + 1) * c + (c + 3) * c",
                flops="4 * n * c * c + 2 * 7**2 * c * c + 4 * (c + n) * (p + 7**2) * c",
            )
        if ratio != 1:
            return cls.card
        return replace(
            cls.card,
            params="(4 * c + 3 * qkv_bias + 1) * c",
            flops="8 * n * c * c + 4 * n * n * c",
            masks={"keys", "causal", "pairs"},
            grid=None,
            taps={"scores": "b h n m", "weights": "b h n m"},
            laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        )

    def __init__(self, site: Site, *, ratio: PositiveInt | None = None, linear: bool = False):
        super().__init__(site)
        from timm.models.pvt_v2 import Attention  # here, so that a list does not wait for timm

        if linear and ratio is not None:
            raise OptionError("`spatial_reduction`: leave `ratio` out, for the linear form pools to 7 × 7")
        self.head_dim, self.ratio, self.linear = site.head_dim, ratio or 2, linear
        self.layers = Attention(site.dim, site.heads, self.ratio, linear, site.qkv_bias)

    def mix(self, x, source, *, mask, layout):
        layers = self.layers
        if self.linear or self.ratio > 1:
            source, mask = self._reduced(x, mask, layout)
        k, v = layers.kv(source).chunk(2, dim=-1)
        return layers.proj(multi_head_attention(self, layers.q(x), k, v, mask))

    def _reduced(self, x, mask, layout):
        """u (b r c), after the special tokens as they are, and a mask of its tokens."""
        layers, (prefix, tokens) = self.layers, layout.split(x)
        there = existing(x, mask)[:, layout.prefix :, None]
        grid = layout.to_grid(tokens.masked_fill(~there, 0.0) if mask.keys is not None else tokens)
        if self.linear:
            share = F.adaptive_avg_pool2d(layout.to_grid(there.to(x.dtype)), POOLED)
            grid = F.adaptive_avg_pool2d(grid, POOLED) / torch.where(share > 0, share, 1.0)
            there = share.flatten(1) > 0
        else:
            y, x_ = layout.grid
            grid = F.pad(grid, (0, -x_ % self.ratio, 0, -y % self.ratio))
            there = windows(there, layout.grid, (self.ratio, self.ratio)).flatten(2).any(dim=2)
        u = layers.norm(layers.sr(grid).flatten(2).mT)
        u = torch.cat([prefix, layers.act(u) if self.linear else u], dim=1)
        return u, mask if mask.keys is None else Mask(
            keys=torch.cat([mask.keys[:, : layout.prefix], there], dim=1)
        )
