"""Talking heads: logits and weights are mixed across the heads.

Shazeer et al., "Talking-Heads Attention", 2020, arXiv:2003.02436, §3.
"""

import torch
from torch import nn

from attnzoo.core import Card, Family, Head, Law, Paper, Site
from attnzoo.functional import einsum, masked_softmax


class TalkingHeads(Head):
    """A' = P_wᵀ softmax(P_lᵀ q kᵀ / √d), then A' v: two h × h matrices let the heads talk before and after the softmax.

    Args:
        site: Where the head is put.
    """

    card = Card(
        name="talking_heads",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention whose logits and weights are mixed across the heads.",
        equation="A' v\nA' = P_wᵀ softmax(P_lᵀ q kᵀ / √d)",
        paper=Paper("Talking-Heads Attention", "Shazeer et al.", 2020, "arXiv:2003.02436", where="§3"),
        time="n m c + n m h h",
        memory="h n m",
        params="2 * h**2",
        flops="4 * n * m * c + 4 * n * m * h**2",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES},
        notes="P_l and P_w start as identities: before training it is softmax attention. The tap `weights` shows A', "
        "whose rows need not sum to 1.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.logit_mix = nn.Parameter(torch.empty(site.heads, site.heads))  # P_l
        self.weight_mix = nn.Parameter(torch.empty(site.heads, site.heads))  # P_w
        self.init_weights()

    def init_weights(self) -> None:
        """Each head talks to itself."""
        nn.init.eye_(self.logit_mix)
        nn.init.eye_(self.weight_mix)

    def attend(self, q, k, v, *, mask, layout):
        logits = einsum(q * q.shape[-1] ** -0.5, k, "b h n d, b h m d -> b h n m")
        scores = self.scores(einsum(logits, self.logit_mix, "b h n m, h g -> b g n m"))
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        weights = einsum(masked_softmax(scores, allowed), self.weight_mix, "b h n m, h g -> b g n m")
        if mask.pairs is not None:  # what other heads may see stays hidden from one that may not
            weights = weights.masked_fill(~allowed, 0.0)
        return self.weights(weights) @ v
