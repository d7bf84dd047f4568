"""Luong's global attention.

Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015, arXiv:1508.04025,
§3 and §3.1, eq. 5-8.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import additive_scores, attention_from_scores

Score = Literal["dot", "general", "concat", "location"]


class LuongGlobal(Mechanism):
    """a = softmax(score(h_t, h̄_s)), c = Σ_s a_s h̄_s, result tanh(W_c [c; h_t]). One head, unscaled scores.

    Scores: `dot` h_tᵀ h̄_s; `general` h_tᵀ W h̄_s; `concat` vᵀ tanh(W [h_t; h̄_s]); `location` row t of W h_t, one entry
    per position, blind to the content of what is attended to. The h_t are the tokens x, the h̄_s are what is read, s.

    Args:
        site: Where the mechanism is put.
        score: Which of the four.
        hidden: Width of the `concat` network, in channels; the width of the tokens when null.

    Raises:
        OptionError: AZ214, when `dot` is asked of a context of another width.
    """

    card = Card(
        name="luong_global",
        family=Family.ADDITIVE,
        summary="Luong's attention over all positions, with scores dot, general, concat or location.",
        equation="tanh(W_c [c_i; x_i])\nc_i = Σ_j a_ij s_j,  a_ij = softmax_j(x_iᵀ W s_j)",
        paper=Paper(
            "Effective Approaches to Attention-based Neural Machine Translation",
            "Luong et al.",
            2015,
            "arXiv:1508.04025",
            where="§3 and §3.1, eq. 5-8",
        ),
        time="n m c + n c c + m c c",
        memory="n m",
        params="{'dot': 0, 'general': e * c, 'concat': (c + e + 1) * (hidden or c), 'location': c * m}[score]"
        " + (e + c) * c",
        flops="{'dot': 2 * n * m * c, 'general': 2 * m * e * c + 2 * n * m * c, 'location': 2 * n * c * m,"
        " 'concat': 2 * (n * c + m * e) * (hidden or c) + (0 if hidden == 1 else 2 * n * m * (hidden or c))}"
        "[score] + 2 * n * m * e + 2 * n * (e + c) * c",
        masks={"keys", "causal", "pairs"},
        one_head=True,
        context=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
    )

    @classmethod
    def claims(cls, *, score: Score, **options) -> Card:
        if score == "location":  # an entry for each position
            return replace(cls.card, laws={Law.STOCHASTIC}, fixed_length="most")
        return cls.card

    def __init__(self, site: Site, *, score: Score = "general", hidden: PositiveInt | None = None):
        super().__init__(site)
        self.score = score
        width, hidden = site.context_dim or site.dim, hidden or site.dim
        if score == "dot" and width != site.dim:
            raise OptionError(
                f"`luong_global` with `score: dot` compares tokens of width {site.dim} with a context of width {width}",
                help="use `score: general`, which has a matrix between them",
            )
        if score == "general":
            self.general = nn.Linear(width, site.dim, bias=False)  # W, eq. 8
        elif score == "concat":
            self.query = nn.Linear(site.dim, hidden, bias=False)  # W = [query | key]
            self.key = nn.Linear(width, hidden, bias=False)
            self.score_weight = nn.Parameter(torch.empty(hidden))  # v
        elif score == "location":
            self.location = nn.Linear(site.dim, self.length, bias=False)
        self.proj = nn.Linear(width + site.dim, site.dim, bias=False)  # W_c, eq. 5: c first
        self.init_weights()

    def init_weights(self) -> None:
        """v of `concat` from N(0, 0.02²); the Linears are the host's to initialise."""
        if self.score == "concat":
            nn.init.normal_(self.score_weight, std=0.02)

    def mix(self, x, source, *, mask, layout):
        scores = self._scores(x, source)[:, None]  # one head
        allowed = mask.dense(x.shape[1], source.shape[1], x.device)
        c = attention_from_scores(self, scores, source[:, None], allowed)[:, 0]
        return torch.tanh(self.proj(torch.cat([c, x], dim=-1)))

    def _scores(self, x, source):
        """(b n m)."""
        if self.score == "dot":
            return x @ source.mT
        if self.score == "general":
            return x @ self.general(source).mT
        if self.score == "concat":
            query, key = self.query(x)[:, None], self.key(source)[:, None]
            return additive_scores(query, key, self.score_weight[None])[:, 0]
        return self.location(x)[..., : source.shape[1]]
