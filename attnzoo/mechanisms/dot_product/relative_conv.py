"""RCMHA: a short convolution along the tokens in every head, then attention with learned relative positions.

Sugiharto et al., 2023, arXiv:2308.03429; positions by sinusoids: Dai et al., "Transformer-XL", 2019, arXiv:1901.02860,
§3.3; taps of each head: So et al., "Primer", 2021, arXiv:2109.08668.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import attention_from_scores, einsum, merge_heads, rearrange, split_heads
from attnzoo.functional.distances import by_pair, distances, sinusoids

TITLE = "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling"


class RelativeConv(Mechanism):
    """softmax((q_i·k_j + u·k_j + q_i·R_r + b_r) / √d) v, r = i - j; q, k and v are x W after a convolution of 3 tokens.

    By channel y_t = Σ_a ω_a x_{t-2+a} + β: the last tap is the token's own.

    Args:
        site: Where the mechanism is put.
        taps: ω and β: `shared`, the same in all heads; `per_head`, of each head its own, as in Primer.
        padding: Where the taps lie: `causal`, the token and the two before it; `symmetric`, its neighbours.
        relative: R and b: `table`, rows that are learned; `sinusoids`, of Transformer-XL, R_r = W s_r and b_r = w·R_r.
        distance: P, rows of the table to either side, of tokens up to P - 1 apart; those farther apart share the last.
            None takes as many as tokens are expected.

    Raises:
        OptionError: AZ214, when `distance` is given where there is no table.
    """

    card = Card(
        name="relative_conv",
        family=Family.DOT_PRODUCT,
        summary="Queries, keys and values are convolved along the tokens; scores know how far apart two tokens are.",
        equation="W_o softmax((q_i·k_j + u·k_j + q_i·R_r + b_r) / √d) v\nr = i − j\n"
        "q = conv(W_q x),  k = conv(W_k x),  v = conv(W_v x)",
        paper=Paper(TITLE, "Sugiharto et al.", 2023, "arXiv:2308.03429"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="(4 * c + qkv_bias + proj_bias + 1) * c + (9 + 2) * (d if taps == 'shared' else c)"
        " + (c * c + c if relative == 'sinusoids' else (2 * (distance or n) - 1) * (c + h))",
        flops="8 * n * c * c + 18 * n * c + 4 * n * n * c + 2 * n * (2 * n - 1) * c"
        " + (2 * (2 * n - 1) * (c + 1) * c if relative == 'sinusoids' else 0)",
        masks={"keys", "causal"},
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="The memory of the segment before, of a language model, is left out. Row P - 1 - r of the table is R_r, "
        "of 2 P - 1; the authors have 2 P rows, P = 4096, and refuse what is longer. Keys are convolved without β, "
        "which a softmax would not see. Tokens that do not exist are zeros to the convolution, like those before the "
        "first. Pairs cannot be hidden: a key holds its neighbours. Grids are read row by row, after special tokens.",
    )

    @classmethod
    def claims(cls, *, padding: str, **options) -> Card:
        return cls.card if padding == "causal" else replace(cls.card, masks={"keys"})

    def __init__(
        self,
        site: Site,
        *,
        taps: Literal["shared", "per_head"] = "shared",
        padding: Literal["causal", "symmetric"] = "causal",
        relative: Literal["table", "sinusoids"] = "table",
        distance: PositiveInt | None = None,
    ):
        super().__init__(site)
        if relative == "sinusoids" and distance is not None:
            raise OptionError("`relative_conv`: leave `distance` out, for sinusoids have no table")
        self.width = c = site.dim
        self.taps, self.around = taps, (2, 0) if padding == "causal" else (1, 1)
        self.q, self.k = nn.Linear(c, c, bias=False), nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=site.qkv_bias)
        w = site.head_dim if taps == "shared" else c
        self.q_conv, self.v_conv = (nn.Conv1d(w, w, 3, groups=w) for _ in range(2))
        self.k_conv = nn.Conv1d(w, w, 3, groups=w, bias=False)
        self.key_bias = nn.Parameter(torch.empty(site.heads, site.head_dim))  # u
        self.far = (distance or site.layout.length) if relative == "table" else 0  # P
        rows, columns = (2 * self.far - 1,) * 2 if self.far else (c, site.head_dim)
        self.position = nn.Parameter(torch.empty(rows, c))  # R, or W
        self.position_bias = nn.Parameter(torch.empty(columns, site.heads))  # b, or w
        self.proj = nn.Linear(c, c, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """R, b, u and w are zero; taps of each head start as Primer's, 1/2 and 1/6 for the others."""
        nn.init.trunc_normal_(self.position, std=0.02)  # as timm draws its matrices
        for start in (self.key_bias, self.position_bias, *((self.position,) if self.far else ())):
            nn.init.zeros_(start)
        if self.taps == "per_head":
            for conv in (self.q_conv, self.k_conv, self.v_conv):
                nn.init.constant_(conv.weight, 0.5 / 3).data[..., self.around[0]] = 0.5

    def mix(self, x, source, *, mask, layout):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if mask.keys is not None:
            q, k, v = (t.masked_fill(~mask.keys[..., None], 0.0) for t in (q, k, v))
        q, k, v = self._near(self.q_conv, q), self._near(self.k_conv, k), self._near(self.v_conv, v)
        keys, bias = self._relative(q)
        content = (q + self.key_bias[:, None]) @ k.mT
        scores = (content + by_pair(q @ keys.mT + bias[:, None])) * q.shape[-1] ** -0.5
        out = attention_from_scores(self, scores, v, mask.dense(x.shape[1], x.shape[1], x.device))
        return self.proj(merge_heads(out))

    def _near(self, conv, t):
        """Tokens (b n c), convolved, as heads (b h n d)."""
        w = conv.in_channels  # of a head, or of all
        t = F.pad(rearrange(t, "b n (r w) -> (b r) w n", w=w), self.around)
        return split_heads(rearrange(conv(t), "(b r) w n -> b n (r w)", r=self.width // w), self.heads)

    def _relative(self, q):
        """R (h 2n-1 d) and b (h 2n-1) for each of `distances`."""
        if self.far:
            row = self.far - 1 - distances(q).clamp(1 - self.far, self.far - 1)
            return rearrange(self.position[row], "r (h d) -> h r d", h=self.heads), self.position_bias[row].mT
        keys = rearrange(sinusoids(q, self.width) @ self.position, "r (h d) -> h r d", h=self.heads)
        return keys, einsum(keys, self.position_bias.to(keys.dtype), "h r d, d h -> h r")


for _name in ("distances", "sinusoids"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
