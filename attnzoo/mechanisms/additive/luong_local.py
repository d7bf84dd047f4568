"""Luong's local attention, monotonic and predictive.

Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015, arXiv:1508.04025,
§3.2, eq. 9-10.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import masked_softmax

Alignment = Literal["monotonic", "predictive"]


class LuongLocal(Mechanism):
    """Attention in a window [p_t - D, p_t + D] of positions around an aligned position p_t.

    `monotonic`: p_t = t. `predictive`: p_t = S σ(v_pᵀ tanh(W_p h_t)) among the S positions that exist, and the weights
    are multiplied by exp(-(s - p_t)² / (2 (D/2)²)) without being normalised again, so they sum to at most 1.
    Positions outside the window or the sequence are absent from the softmax. Token t receives tanh(W_c [c_t; h_t]), c_t
    the mean of the h̄_s by these weights; the h_t are the tokens x, the h̄_s are what is read, s.

    Args:
        site: Where the mechanism is put.
        alignment: `monotonic` (local-m) or `predictive` (local-p).
        window: D, in tokens to each side.
        score: `dot` h_tᵀ h̄_s or `general` h_tᵀ W h̄_s, unscaled.
        one_based: Whether the positions among which p_t is predicted are 1 to S, and not 0 to S - 1.

    Raises:
        OptionError: AZ214, when `dot` is asked of a context of another width, or `one_based` of positions that are not
            predicted.
    """

    card = Card(
        name="luong_local",
        family=Family.ADDITIVE,
        summary="Luong's attention in a window around an aligned position, monotonic or predicted.",
        equation="tanh(W_c [c_i; x_i])\n"
        "c_i = Σ_j a_ij s_j,  a_ij = softmax_j(x_iᵀ W s_j) over |j − p_i| ≤ D\n"
        "p_i = i",
        paper=Paper(
            "Effective Approaches to Attention-based Neural Machine Translation",
            "Luong et al.",
            2015,
            "arXiv:1508.04025",
            where="§3.2, eq. 9-10",
        ),
        time="n m c + n c c + m c c",
        memory="n m",
        params="((c + 1) * c if alignment == 'predictive' else 0) + (e * c if score == 'general' else 0)"
        " + (e + c) * c",
        flops="(2 * n * c * c if alignment == 'predictive' else 0)"
        " + (2 * m * e * c if score == 'general' else 0) + 2 * n * m * c"
        " + 2 * n * m * e + 2 * n * (e + c) * c",
        masks={"keys", "causal", "pairs"},
        one_head=True,
        context=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.LOCAL},
        notes="Computed as dense attention under a window mask. Special tokens count as positions. The paper does not "
        "say whether positions are counted from 0 or from 1. Where p is predicted, tokens that do not exist are not "
        "counted, wherever they are.",
    )

    @classmethod
    def claims(cls, *, alignment: Alignment, **options) -> Card:
        if alignment == "predictive":  # p_t knows the whole length, and the Gaussian is not normalised
            return replace(cls.card, masks={"keys"}, laws={Law.SUBSTOCHASTIC})
        return cls.card

    def __init__(
        self,
        site: Site,
        *,
        alignment: Alignment = "monotonic",
        window: PositiveInt = 10,
        score: Literal["dot", "general"] = "general",
        one_based: bool = False,
    ):
        super().__init__(site)
        self.alignment, self.window, self.first = alignment, window, int(one_based)
        if one_based and alignment == "monotonic":
            raise OptionError(
                "`luong_local`: `one_based` says nothing where positions are not predicted, for p_t is t",
                help="leave it out, or choose `alignment: predictive`",
            )
        width = site.context_dim or site.dim
        if score == "dot" and width != site.dim:
            raise OptionError(
                f"`luong_local` with `score: dot` compares tokens of width {site.dim} with a context of width {width}",
                help="use `score: general`, which has a matrix between them",
            )
        self.general = nn.Identity() if score == "dot" else nn.Linear(width, site.dim, bias=False)
        if alignment == "predictive":
            self.position = nn.Linear(site.dim, site.dim, bias=False)  # W_p
            self.position_weight = nn.Parameter(torch.empty(site.dim))  # v_p
        self.proj = nn.Linear(width + site.dim, site.dim, bias=False)  # W_c: c first
        self.init_weights()

    def init_weights(self) -> None:
        """v_p from N(0, 0.02²): the predicted position starts in the middle; the Linears are the host's."""
        if self.alignment == "predictive":
            nn.init.normal_(self.position_weight, std=0.02)

    def reach(self) -> int:
        return self.window

    def mix(self, x, source, *, mask, layout):
        n, m = x.shape[1], source.shape[1]
        distance = self._places(m, mask, x.device) - self._aligned(x, m, mask)  # (b n m)
        allowed = (distance.abs() <= self.window)[:, None]
        outer = mask.dense(n, m, x.device)
        allowed = allowed if outer is None else allowed & outer
        weights = masked_softmax(self.scores((x @ self.general(source).mT)[:, None]), allowed)
        if self.alignment == "predictive":
            sigma = self.window / 2
            weights = weights * (-(distance**2) / (2 * sigma**2)).exp()[:, None]  # eq. 10
        c = (self.weights(weights) @ source[:, None])[:, 0]
        return torch.tanh(self.proj(torch.cat([c, x], dim=-1)))

    def _places(self, m, mask, device):
        """s, (1 1 m); where p_t is predicted, among the positions that exist, (b 1 m)."""
        if self.alignment == "monotonic" or mask.keys is None:
            return torch.arange(self.first, self.first + m, device=device)[None, None]
        return mask.keys.cumsum(dim=1)[:, None] - 1 + self.first

    def _aligned(self, x, m, mask):
        """p_t, in positions: (b n 1), or (1 n 1) where it is t."""
        if self.alignment == "monotonic":
            return torch.arange(x.shape[1], device=x.device)[None, :, None]
        length = m if mask.keys is None else mask.keys.sum(dim=1)[:, None, None]
        share = torch.sigmoid(torch.tanh(self.position(x)) @ self.position_weight)[..., None]  # eq. 9
        return length * share
