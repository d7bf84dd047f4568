"""RLMHSA: attention to pooled keys and values, with projections that are sums of branches and fold into one matrix.

Tan et al., "FMViT", 2023, arXiv:2311.05707; pooled keys as in Li et al., "Next-ViT", 2022, arXiv:2207.05501, §3.3.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mask, Mechanism, MultiGroup, OptionError, Paper, PositiveInt, Site
from attnzoo.core.multi_group import fold
from attnzoo.functional import masked_mean, multi_head_attention, windows


class Rlmhsa(Mechanism):
    """P_o softmax(P_q x (P_k x')ᵀ / √d) P_v x', x' = γ ⊙ meanpool(x) + β; every P is a sum of branches, `MultiGroup`.

    Args:
        site: Where the mechanism is put.
        ratio: Side of the squares of tokens that are pooled to x'; with 1, x' = x.
        pool: `square`; `raster`, as many tokens one after the other, row by row, as Next-ViT's code.
        reduction: r: queries and keys have c / r channels.
        groups: The most blocks of a branch, of those of 1, 2, 4, ... None takes 4, or the most of 2 and 1 that divides.
        identity: Whether x itself is a branch, too, of a P that keeps the channels.

    Raises:
        OptionError: AZ214, when `reduction` or `groups` do not divide the channels, or `groups` is no power of two.
    """

    card = Card(
        name="rlmhsa",
        family=Family.PROJECTION,
        summary="Attention to pooled keys and values; projections are sums of grouped branches that fold into one.",
        equation="P_o softmax(P_q x (P_k x')ᵀ / √d) P_v x'\nx' = γ ⊙ meanpool(x) + β",
        paper=Paper(
            "FMViT: A multiple-frequency mixing Vision Transformer", "Tan et al.", 2023, "arXiv:2311.05707"
        ),
        time="n m c + n c c",
        memory="h n m + n c",
        params="2 * (c + (s := c // reduction)) "
        "* ((2 * (g := groups or max(i for i in (1, 2, 4) if c // reduction % i == 0)) - 1) * c // g "
        "+ g.bit_length()) + 2 * identity * (2 * c if s == c else c) + qkv_bias * (s + c) + proj_bias * c "
        "+ (ratio > 1) * 2 * c",
        flops="2 * (c + (s := c // reduction)) * n * c + 2 * (s + c) * (n + c) * (p + "
        "(ceil((n - p) / ratio**2) if pool == 'raster' else prod(ceil(side / ratio) for side in sides)))",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n r", "weights": "b h n r"},
        laws={Law.STOCHASTIC},
        fidelity="inspired",
        notes="There is no code of the authors; what their paper leaves open follows Next-ViT. Batch norms would let "
        "samples depend on each other: in their place are γ and β, which is what they are in eval mode. P_k has no β, "
        "which a softmax would not see. `fold` makes one layer of each P, in place. Special tokens ask, and are asked "
        "one by one, not pooled. Of a grid that squares do not divide the last ones are smaller.",
    )

    @classmethod
    def claims(cls, *, ratio: int, **options) -> Card:
        every = replace(
            cls.card, taps={"scores": "b h n m", "weights": "b h n m"}, masks={"keys", "causal", "pairs"}
        )
        return cls.card if ratio > 1 else replace(every, laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT})

    def __init__(
        self,
        site: Site,
        *,
        ratio: PositiveInt = 2,
        pool: Literal["square", "raster"] = "square",
        reduction: PositiveInt = 1,
        groups: PositiveInt | None = None,
        identity: bool = False,
    ):
        super().__init__(site)
        c, narrow = site.dim, site.dim // reduction
        most = groups or math.gcd(4, c, narrow)
        if site.head_dim % reduction:
            raise OptionError(f"`rlmhsa`: {reduction} does not divide the {site.head_dim} channels of a head")
        self.ratio, self.raster = ratio, pool == "raster"
        self.q: nn.Module = MultiGroup(c, narrow, most, identity and narrow == c, site.qkv_bias)
        self.k: nn.Module = MultiGroup(c, narrow, most, identity and narrow == c, False)
        self.v: nn.Module = MultiGroup(c, c, most, identity, site.qkv_bias)
        self.proj: nn.Module = MultiGroup(c, c, most, identity, site.proj_bias)
        if ratio > 1:
            self.pool_scale, self.pool_bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def fold(self) -> "Rlmhsa":
        """Make one layer of each P, in place; what it gives stays the same."""
        fold(self)
        return self

    def mix(self, x, source, *, mask, layout):
        if self.ratio > 1:
            source, mask = self._pooled(x, mask.keys, layout)
        return self.proj(multi_head_attention(self, self.q(x), self.k(source), self.v(source), mask))

    def _pooled(self, x, keys, layout):
        """x' (b r c), of special tokens and means over the tokens of each square that exist, and a mask of its keys."""
        p, (prefix, t) = layout.prefix, layout.split(x)
        there = torch.ones_like(t[..., :1], dtype=torch.bool) if keys is None else keys[:, p:, None]
        t, there = (self._squares(u, layout.grid) for u in (t, there))
        means = masked_mean(t, there, dim=2)
        keys = None if keys is None else torch.cat([keys[:, :p], there[..., 0].any(dim=2)], dim=1)
        return torch.cat([prefix, means], dim=1) * self.pool_scale + self.pool_bias, Mask(keys=keys)

    def _squares(self, t, grid):
        """Grid tokens (b n e) by square, (b r w e); the last ones are filled up."""
        s = self.ratio
        if self.raster:
            return F.pad(t, (0, 0, 0, -t.shape[1] % s**2)).unflatten(1, (-1, s**2))
        return windows(t, grid, (s, s))
