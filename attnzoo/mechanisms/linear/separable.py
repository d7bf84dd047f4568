"""Separable attention: one score for each token gives one context vector, which scales the channels of all tokens.

Mehta, Rastegari, "Separable Self-attention for Mobile Vision Transformers", 2022, arXiv:2206.02680, §3.2.
"""

from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site
from attnzoo.functional import masked_softmax


class Separable(Mechanism):
    """W_o (relu(W_v x) ⊙ Σ_j α_j W_k s_j), α = softmax over the tokens of w·s: s is x itself, or the context.

    Args:
        site: Where the mechanism is put.
    """

    card = Card(
        name="separable",
        family=Family.LINEAR,
        summary="MobileViTv2: a softmax over one score for each token, and one context vector for all queries.",
        equation="W_o (relu(W_v x) ⊙ Σ_j α_j W_k s_j)\nα_j = softmax_j(w·s_j)",
        paper=Paper(
            "Separable Self-attention for Mobile Vision Transformers",
            "Mehta, Rastegari",
            2022,
            "arXiv:2206.02680",
            where="§3.2, eq. 1",
        ),
        time="n c c + m c c",
        memory="n c + m c",
        params="(e + qkv_bias) * (1 + c) + (c + qkv_bias) * c + (c + proj_bias) * c",
        flops="2 * m * e * (1 + c) + 2 * m * c + 4 * n * c * c",
        masks={"keys"},
        one_head=True,
        context=True,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b m", "weights": "b m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="All tokens are together: MobileViTv2 cuts the image into squares of four places, and mixes each of the "
        "four apart. There is one head. w and W_k are one matrix, whose bias moves all scores alike. Where no token "
        "exists the context vector is zero.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        c = site.dim
        self.qk = nn.Linear(site.context_dim or c, 1 + c, bias=site.qkv_bias)  # w and W_k
        self.v = nn.Linear(c, c, bias=site.qkv_bias)
        self.proj = nn.Linear(c, c, bias=site.proj_bias)  # W_o

    def mix(self, x, source, *, mask, layout):
        q, k = self.qk(source).split([1, x.shape[-1]], dim=-1)
        weights = self.weights(masked_softmax(self.scores(q[..., 0]), mask.keys))  # (b m)
        return self.proj(self.v(x).relu() * (weights[:, None] @ k))
