"""Efficient attention: keys are normalised over the tokens, queries over the channels, and no pairs are formed.

Shen et al., "Efficient Attention: Attention with Linear Complexities", 2018, arXiv:1812.01243, §3, eq. 4-5.
"""

from attnzoo.core import Card, Family, Head, Law, Paper
from attnzoo.functional import masked_softmax


class Efficient(Head):
    """ρ_q(q) (ρ_k(k)ᵀ v): ρ_q is a softmax over the d channels of a query, ρ_k over the m keys of a channel; no scale.

    Args:
        site: Where the head is put.
    """

    card = Card(
        name="efficient",
        family=Family.LINEAR,
        summary="A softmax over the channels of queries and one over the tokens of keys; cost linear in their number.",
        equation="softmax_d(q) (softmax_m(k)ᵀ v)",
        paper=Paper(
            "Efficient Attention: Attention with Linear Complexities",
            "Shen et al.",
            2018,
            "arXiv:1812.01243",
            where="§3, eq. 4-5",
        ),
        time="n c d + m c d",
        memory="n c + m c + c d",
        params="0",
        flops="2 * (n + m) * c * d",
        masks={"keys"},
        context=True,
        taps={"scores": "b h d m", "weights": "b h d m"},
        laws={
            Law.STOCHASTIC,
            Law.PERMUTATION_EQUIVARIANT,
            Law.LINEAR_IN_VALUES,
            Law.BOUNDED,
            Law.HEADS_APART,
        },
        notes="Taps show the keys: d maps over the tokens for each head, which queries mix by weights that sum to 1, "
        "so the map of pairs that is never formed is stochastic too. Of the paper's two normalisations this is "
        "`softmax`, not `scaling`. It has no causal form: every key has a say in how the others are normalised. "
        "Below some 400 tokens softmax is as fast.",
    )

    def attend(self, q, k, v, *, mask, layout):
        there = None if mask.keys is None else mask.keys[:, None, None]
        maps = self.weights(masked_softmax(self.scores(k.mT), there))  # ρ_k, (b h d m)
        return q.softmax(dim=-1) @ (maps @ v)
