"""Luong's global attention.

Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015, arXiv:1508.04025,
§3.1, eq. 5-8.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core import NO_MASK, Card, Family, Law, Layout, Mask, Mechanism, Paper, PositiveInt, Site, Tap
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.functional import additive_scores, attention_from_scores

Score = Literal["dot", "general", "concat", "location"]


class LuongGlobal(Mechanism):
    """a = softmax(score(h_t, h̄_s)), c = Σ_s a_s h̄_s, result tanh(W_c [c; h_t]). One head, unscaled scores.

    Scores: `dot` h_tᵀ h̄_s; `general` h_tᵀ W h̄_s; `concat` vᵀ tanh(W [h_t; h̄_s]); `location` row t of W h_t, one entry
    per position, blind to the content of what is attended to.

    Args:
        site: Where the mechanism is put.
        score: Which of the four.
        hidden: Width of the `concat` network, in channels; the width of the tokens when null.

    Raises:
        RecipeError: AZ214, when `dot` is asked of a context of another width.
        LayoutMismatch: AZ403, when `location` meets more tokens than the site was built for.
    """

    card = Card(
        name="luong_global",
        family=Family.ADDITIVE,
        summary="Luong's attention over all positions, with scores dot, general, concat or location.",
        paper=Paper("Effective Approaches to Attention-based Neural Machine Translation", "Luong et al.", 2015,
                    "arXiv:1508.04025", where="§3.1, eq. 5-8"),
        time="n m c",
        memory="n m",
        masks={"keys", "causal", "pairs"},
        context=True,
        weights="b h n m",
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
    )  # fmt: skip

    @classmethod
    def claims(cls, *, score: Score = "general", **options) -> Card:
        return replace(cls.card, laws=frozenset({Law.STOCHASTIC})) if score == "location" else cls.card

    def __init__(self, site: Site, *, score: Score = "general", hidden: PositiveInt | None = None):
        super().__init__(site)
        self.card = self.claims(score=score)
        self.score, self.attn_drop = score, site.attn_drop
        width, hidden = site.context_dim or site.dim, hidden or site.dim
        if score == "dot" and width != site.dim:
            raise RecipeError(
                "AZ214",
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
            self.location = nn.Linear(site.dim, site.layout.length, bias=False)
        self.scores, self.weights = Tap("b h n m"), Tap("b h n m")
        self.proj = nn.Linear(width + site.dim, site.dim, bias=False)  # W_c, eq. 5: c first
        self.proj_drop = nn.Dropout(site.proj_drop)
        self.init_weights()

    def init_weights(self) -> None:
        """v of `concat` from N(0, 0.02²); the Linears are the host's to initialise."""
        if self.score == "concat":
            nn.init.normal_(self.score_weight, std=0.02)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        source = self.source(x, context)
        scores = self._scores(x, source)[:, None]  # one head
        allowed = mask.for_one_head().dense(x.shape[1], source.shape[1], x.device)
        dropout = self.attn_drop if self.training else 0.0
        c = attention_from_scores(scores, source[:, None], allowed, self.scores, self.weights, dropout)[:, 0]
        return self.proj_drop(torch.tanh(self.proj(torch.cat([c, x], dim=-1))))

    def _scores(self, x: Tensor, source: Tensor) -> Tensor:
        """(b n m)."""
        if self.score == "dot":
            return x @ source.mT
        if self.score == "general":
            return x @ self.general(source).mT
        if self.score == "concat":
            query, key = self.query(x)[:, None], self.key(source)[:, None]
            return additive_scores(query, key, self.score_weight[None])[:, 0]
        if source.shape[1] > self.location.out_features:
            raise LayoutMismatch(
                "AZ403",
                f"{source.shape[1]} tokens are more than the {self.location.out_features} that `luong_global` with "
                "`score: location` was built for",
                help="build it for the longest input, or use another score",
            )
        return self.location(x)[..., : source.shape[1]]
