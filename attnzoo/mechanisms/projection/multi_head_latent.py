"""Multi-head latent attention: keys and values of all heads are made of one small latent of each token.

DeepSeek-AI, "DeepSeek-V2", 2024, arXiv:2405.04434, §2.1.
"""

from dataclasses import replace

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, NonNegativeInt, Paper, PositiveInt, Site
from attnzoo.core.rotary import rotate
from attnzoo.functional import dot_product_attention, einsum, merge_heads, rearrange


class MultiHeadLatent(Mechanism):
    """softmax((q k_Cᵀ + q_R k_Rᵀ) / √(d + d_R)) v in each head; k_C, v = W_UK c, W_UV c, of c = norm(W_DKV x).

    q = W_UQ x; q_R = W_QR x and k_R = W_KR x are turned by their positions; k_R is one for all heads.

    Args:
        site: Where the mechanism is put.
        rank: Channels of c. None takes the paper's, 4 d.
        pairs: d_R / 2, pairs of channels of a head that are turned; 0 for none. None takes the paper's d_R = d / 2.
        query_rank: Channels of a latent of the queries, which is normed too; None makes queries of x itself.
    """

    card = Card(
        name="multi_head_latent",
        family=Family.PROJECTION,
        summary="DeepSeek's MLA: keys and values come from a small latent; only that and one turned key are cached.",
        equation="W_O softmax((q k_Cᵀ + q_R k_Rᵀ) / √(d + d_R)) v\n"
        "k_C = W_UK c,  v = W_UV c,  c = norm(W_DKV x)\n"
        "q = W_UQ x,  q_R = turn(W_QR x),  k_R = turn(W_KR x)",
        paper=Paper(
            "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
            "DeepSeek-AI",
            2024,
            "arXiv:2405.04434",
            where="§2.1, eq. 9-19",
        ),
        time="n m c + n c c",
        memory="h n m + n c",
        params="(c + 1) * (query_rank or 0) + c * (query_rank or c) + (3 * c + 1) * (rank or 4 * d) + c**2 "
        "+ 2 * (max(1, d // 4) if pairs is None else pairs) * (h * (query_rank or c) + c)",
        flops="2 * n * c * ((query_rank or 0) + (query_rank or c) + 3 * (rank or 4 * d) + c) + 4 * n * m * c "
        "+ 4 * (max(1, d // 4) if pairs is None else pairs) * n * (h * (query_rank or c) + c + h * m)",
        masks={"keys", "causal", "pairs"},
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC},
        notes="There are no biases, as in the authors' code. Positions are places in the order of the tokens, special "
        "ones first, grids row by row; `pairs: 0` leaves positions to the host. A step of decoding keeps rank + d_R "
        "numbers of a token and attends to the latents, without making keys and values of them. YaRN, which the "
        "authors add for longer texts, is left out.",
    )

    @classmethod
    def claims(cls, *, pairs: int | None, **options) -> Card:
        if pairs != 0:
            return cls.card
        return replace(cls.card, laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT})

    def __init__(
        self,
        site: Site,
        *,
        rank: PositiveInt | None = None,
        pairs: NonNegativeInt | None = None,
        query_rank: PositiveInt | None = None,
    ):
        super().__init__(site)
        c, h, d = site.dim, site.heads, site.head_dim
        turned = 2 * (max(1, d // 4) if pairs is None else pairs)  # d_R
        self.head_dim, self.rank, self.turned = d, rank or 4 * d, turned
        self.query_down = nn.Linear(c, query_rank, bias=False) if query_rank else nn.Identity()  # W_DQ
        self.query_norm = nn.RMSNorm(query_rank, eps=1e-6) if query_rank else nn.Identity()
        self.query_up = nn.Linear(query_rank or c, h * (d + turned), bias=False)  # W_UQ and W_QR
        self.down = nn.Linear(c, self.rank + turned, bias=False)  # W_DKV and W_KR
        self.norm = nn.RMSNorm(self.rank, eps=1e-6)
        self.up = nn.Linear(self.rank, 2 * h * d, bias=False)  # W_UK and W_UV, head by head
        self.proj = nn.Linear(h * d, c, bias=False)  # W_O

    def mix(self, x, source, *, mask, layout):
        latent, key = self._latents(x)
        return self._merged(self._queries(x), latent, key, mask)

    def step(self, x, cache, context=None, *, mask, layout, context_layout=None):
        source, first = self.source(x, context), cache.length
        q, (latent, key) = self._queries(x, first), self._latents(source, first)
        latent, key = cache.extend(latent, key[:, 0])
        if type(self.up) is not nn.Linear:  # somebody has put more around the matrix than its weight
            return self.proj_drop(self._merged(q, latent, key[:, None], mask))
        k_up, v_up = rearrange(self.up.weight, "(h t d) r -> t h d r", t=2, d=self.head_dim)
        q, turned = q.split([self.head_dim, self.turned], dim=-1)
        q = torch.cat([einsum(q, k_up, "b h n d, h d r -> b h n r"), turned], dim=-1)
        q = q * (q.shape[-1] / (self.head_dim + self.turned)) ** 0.5  # the scale is that of the wider ones
        k, v = (t[:, None].expand(-1, self.heads, -1, -1) for t in (torch.cat([latent, key], dim=-1), latent))
        out = einsum(dot_product_attention(self, q, k, v, mask), v_up, "b h n r, h d r -> b h n d")
        return self.proj_drop(self.proj(merge_heads(out)))

    def _merged(self, q, latent, key, mask):
        """What queries (b h n d+d_R) receive of c (b m r) and k_R (b 1 m d_R), projected."""
        k, v = rearrange(self.up(latent), "b m (h t d) -> t b h m d", t=2, d=self.head_dim)
        k = torch.cat([k, key.expand(-1, self.heads, -1, -1)], dim=-1)
        return self.proj(merge_heads(dot_product_attention(self, q, k, v, mask)))

    def _queries(self, x, first=0):
        """(b h n d+d_R), the last ones turned."""
        q = self.query_up(self.query_norm(self.query_down(x)))
        q = rearrange(q, "b n (h e) -> b h n e", h=self.heads)
        q, turned = q.split([self.head_dim, self.turned], dim=-1)
        return torch.cat([q, rotate(turned, first)], dim=-1)

    def _latents(self, x, first=0):
        """c (b m r), and k_R, turned, (b 1 m d_R)."""
        latent, key = self.down(x).split([self.rank, self.turned], dim=-1)
        return self.norm(latent), rotate(key[:, None], first)
