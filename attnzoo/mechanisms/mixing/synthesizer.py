"""Synthesizer: the scores of a token are made from it alone, or learned, without looking at any key.

Tay et al., "Synthesizer: Rethinking Self-Attention for Transformer Models", 2020, arXiv:2005.00743, §3.
"""

import math
from typing import Any, Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Paper, PositiveInt, Site
from attnzoo.functional import MLPByHead, attention_from_scores, merge_heads, nearest_factors, rearrange

Scores = Literal[
    "dense", "random", "factorised_dense", "factorised_random",
    "random+dense", "random+dot", "dense+dot", "random+dense+dot",
]  # fmt: skip

NETS = (  # channels that the small networks take and give, in formulas
    "[(c if sees == 'full' else d, out) for a in [max(a for a in range(1, n + 1) if n % a == 0 and a * a <= n)] "
    "for b in [n // a if 4 * a * a >= n else ceil(n**0.5)] "
    "for out in ([ceil(n / b), b] if scores == 'factorised_dense' else [n] if 'dense' in scores else [])]"
)


class Synthesizer(Mechanism):
    """W softmax(B) v with scores B of n × N, for each head, of which n tokens use the first n columns.

    `dense`: B_i = f(x_i) = W₂ relu(W₁ x_i + b₁) + b₂. `random`: B is learned. `factorised_dense`: B_ij = f_i[j // β]
    g_i[j mod β], f of α and g of β numbers, α β = N. `factorised_random`: B = R₁ R₂ᵀ, of N × k. `dot`: q kᵀ / √d. Sums
    have shares of their own: Σ_s γ_s B_s, γ the softmax of as many learned numbers.

    Args:
        site: Where the mechanism is put; N is its number of tokens.
        scores: What B is.
        sees: Of `dense`: what the f of a head is given, its own d channels of x, `head`, or all of x, `full`.
        frozen: Whether what is random stays as it was drawn.
        rank: k, columns of R₁ and R₂.
    """

    card = Card(
        name="synthesizer",
        family=Family.MIXING,
        summary="Scores made from each token alone (dense) or learned (random), in the place of q kᵀ.",
        equation="W softmax(B) v\nB_i = W₂ relu(W₁ x_i + b₁) + b₂,  v = W_v x",
        paper=Paper("Synthesizer: Rethinking Self-Attention for Transformer Models", "Tay et al.", 2020,
                    "arXiv:2005.00743", "§3"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="2 * c * c + (qkv_bias + proj_bias) * c + (2 * (c + qkv_bias) * c if 'dot' in scores else 0) "
        "+ (0 if frozen or 'random' not in scores else 2 * h * n * rank if 'factor' in scores else h * n * n) "
        f"+ sum(h * ((width + 1) * d + (d + 1) * out) for width, out in {NETS}) "
        "+ (scores.count('+') + 1 if '+' in scores else 0)",
        flops="4 * n * c * c + 2 * n * n * c + (4 * n * c * c + 2 * n * n * c if 'dot' in scores else 0) "
        "+ (2 * h * n * n * rank if scores == 'factorised_random' else 0) "
        f"+ sum(2 * n * (width + out) * c for width, out in {NETS})",
        masks={"keys", "causal", "pairs"},
        fixed_length="most",
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC},
        notes="Synthesised scores are not divided by √d. That a head sees its own channels is our reading; the other "
        "is `sees: full`. Where no α near √N divides N, such as a prime N, α β is a little more, and columns beyond N "
        "are not used. Random scores start from N(0, 1).",
    )  # fmt: skip

    table: Any  # R, or R₁ and R₂

    def __init__(
        self, site: Site, *, scores: Scores = "dense", sees: Literal["head", "full"] = "head",
        frozen: bool = False, rank: PositiveInt = 8,
    ):  # fmt: skip
        super().__init__(site)
        c, h, d, length = site.dim, site.heads, site.head_dim, self.length
        self.sources, self.full = scores.split("+"), sees == "full"
        outs = {"dense": [length], "factorised_dense": factors(length)}
        self.nets = nn.ModuleList(
            MLPByHead(h, c if self.full else d, d, out) for name in self.sources for out in outs.get(name, [])
        )
        shapes = {"random": (h, length, length), "factorised_random": (2, h, length, rank)}
        table = torch.empty(shapes[self.sources[0]]) if self.sources[0] in shapes else None
        if frozen:
            self.register_buffer("table", table)
        else:
            self.table = None if table is None else nn.Parameter(table)
        self.qk = nn.Linear(c, 2 * c, bias=site.qkv_bias) if "dot" in self.sources else None
        self.shares = nn.Parameter(torch.empty(len(self.sources))) if len(self.sources) > 1 else None
        self.v = nn.Linear(c, c, bias=site.qkv_bias)
        self.proj = nn.Linear(c, c, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """Random scores of variance 1, small networks as linear layers are, equal shares."""
        if self.table is not None:  # a product of two of k columns has a variance of 1, too
            nn.init.normal_(self.table, std=1.0 if self.table.ndim == 3 else self.table.shape[3] ** -0.25)
        for net in self.nets:
            net.reset_parameters()  # type: ignore[operator]
        if self.shares is not None:
            nn.init.zeros_(self.shares)

    def mix(self, x, source, *, mask, layout):
        (b, n, _), heads = x.shape, self.heads
        made = [self._scores(name, x, n).expand(b, -1, -1, -1) for name in self.sources]
        if self.shares is not None:
            gamma = self.shares.softmax(dim=0)
            made = [gamma[i] * scores for i, scores in enumerate(made)]
        v = rearrange(self.v(x), "b m (h d) -> b h m d", h=heads)
        return self.proj(merge_heads(attention_from_scores(self, sum(made), v, mask.dense(n, n, x.device))))

    def _scores(self, name, x, n):
        """What one source makes, (b h n m), or (1 h n m) where x has no say."""
        own = x[:, None] if self.full else rearrange(x, "b n (h d) -> b h n d", h=self.heads)
        if "dense" in name:
            f, *g = (net(own) for net in self.nets)
            return (f if not g else (f[..., None] * g[0][..., None, :]).flatten(-2))[..., :n]
        if name == "dot":
            q, k = rearrange(self.qk(x), "b n (two h d) -> two b h n d", two=2, h=self.heads)
            return (q * q.shape[-1] ** -0.5) @ k.mT
        made = self.table if name == "random" else self.table[0] @ self.table[1].mT
        return made[None, :, :n, :n]


def factors(length: int) -> tuple[int, int]:
    """α and β whose product is a length, or, where they would be far apart, a little more."""
    alpha, beta = nearest_factors(length)
    if 4 * alpha**2 >= length:
        return alpha, beta
    beta = math.isqrt(length - 1) + 1
    return -(-length // beta), beta
