"""LAMA: a few attention maps score the tokens against one global vector by a low-rank bilinear form.

Mehta, Rangwala and Ramakrishnan, "Low Rank Factorization for Compact Multi-Head Self-Attention", 2019,
arXiv:1912.00835, §3.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, OptionError, Paper, Pool, PositiveInt, Site
from attnzoo.functional import existing, masked_softmax, rearrange, reduce


class Lama(Pool):
    """W [A₁ x, ..., A_r x], A = softmax over tokens of f, f_t = normed(tanh(1ᵀ(P_iᵀ g ∘ Q_iᵀ u_t)) for i = 1, ..., r).

    u_t = tanh(W_u x_t + b_u), g is the global vector, P_i and Q_i are c × rank, the norm is that of the r scores e_t of
    a token.

    Args:
        site: Where the pool is put.
        maps: r, how many attention maps (the paper's heads); at least 2.
        rank: Columns of P_i and Q_i.
        context: g: `learned`, a vector of its own, or `mean`, the mean of the tokens.
        mlp: Whether there is u; otherwise scores are of x itself.

    Raises:
        OptionError: AZ214, for one map: its score would be 1 or -1 whatever the token, and would teach nothing.
    """

    card = Card(
        name="lama",
        family=Family.LATENT,
        summary="A few maps, scored against one global vector by a low-rank bilinear form, read all tokens.",
        equation="W [A₁ x; …; A_r x]\n"
        "A_i = softmax_t(f_ti),  f_t = e_t / ‖e_t‖\n"
        "e_ti = tanh(1ᵀ (P_iᵀ g ⊙ Q_iᵀ u_t)),  u_t = tanh(W_u x_t + b_u)",
        paper=Paper(
            "Low Rank Factorization for Compact Multi-Head Self-Attention",
            "Mehta, Rangwala, Ramakrishnan",
            2019,
            "arXiv:1912.00835",
            where="§3",
        ),
        time="n c c + n r c + r c c",
        memory="n c",
        params="((c + 1) * c if mlp else 0) + 2 * c * maps * rank + (c if context == 'learned' else 0)"
        " + (maps * c + proj_bias) * c",
        flops="(2 * n * c * c if mlp else 0) + 2 * (1 + n) * c * maps * rank"
        " + 2 * maps * n * c + 2 * maps * c * c",
        masks={"keys"},
        honours={"proj_bias"},
        taps={"scores": "b r m", "weights": "b r m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="The paper hands the r pooled vectors, side by side, to a classifier; here a projection makes one token "
        "of them. The paper's tokens come from a GRU, and `context: mean` is that of its inputs; here it is that of "
        "the tokens. Scores are at most 1, so within a map no weight is more than e² times another: attention is "
        "soft. Special tokens are read like all others. Where no token exists the projection's bias is pooled.",
    )

    def __init__(
        self,
        site: Site,
        *,
        maps: PositiveInt = 8,
        rank: PositiveInt = 1,
        context: Literal["learned", "mean"] = "learned",
        mlp: bool = True,
    ):
        super().__init__(site)
        if maps == 1:
            raise OptionError(
                "`lama`: one map has no other to be normalised with",
                why="its score would be 1 or -1 for every token, with a gradient of zero",
                help="choose at least 2 maps",
            )
        self.maps = maps
        self.hidden = nn.Linear(site.dim, site.dim) if mlp else None  # W_u, b_u
        self.left = nn.Linear(site.dim, maps * rank, bias=False)  # P
        self.right = nn.Linear(site.dim, maps * rank, bias=False)  # Q
        self.vector = nn.Parameter(torch.empty(site.dim)) if context == "learned" else None  # g
        self.proj = nn.Linear(maps * site.dim, site.dim, bias=site.proj_bias)  # W
        self.init_weights()

    def init_weights(self) -> None:
        """P and Q uniform within 1/√c; the global vector as a token that is normalised."""
        for layer in (self.left, self.right):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
        if self.vector is not None:
            nn.init.normal_(self.vector)

    def pool(self, x, *, mask, layout):
        keys = existing(x, mask)
        x = x.masked_fill(~keys[..., None], 0.0)
        vector = self.vector
        if vector is None:  # of nobody: zero
            vector = x.sum(dim=1, keepdim=True) / keys.sum(dim=1).clamp(min=1)[:, None, None]
        u = x if self.hidden is None else self.hidden(x).tanh()
        products = self.left(vector) * self.right(u)  # (b m r*rank)
        scores = reduce(products, "b m (r k) -> b r m", "sum", r=self.maps).tanh()
        scores = self.scores(F.normalize(scores, dim=1))
        weights = self.weights(masked_softmax(scores, keys[:, None]))
        return self.proj(rearrange(weights @ x, "b r c -> b (r c)"))
