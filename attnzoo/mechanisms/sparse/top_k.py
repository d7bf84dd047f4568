"""Top-k attention: a softmax over the k keys that score best with a query.

Gupta et al., "Memory-efficient Transformers via Top-k Attention", 2021, arXiv:2106.06899, §3.
"""

import torch
from torch import Tensor, fx

from attnzoo.core import Card, Family, Head, Law, Paper, PositiveInt, Site
from attnzoo.functional import dot_product_attention, masked_softmax


def best(scores: Tensor, allowed: Tensor | None, keep: int) -> Tensor:
    """Which keys have one of the `keep` largest scores of their row, (b h n m); of equal ones those that come first.

    Args:
        scores: (b h n m).
        allowed: Boolean that broadcasts to the scores; None allows all.
        keep: How many are kept, of those that are allowed.
    """
    seen = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
    scores = scores.masked_fill(~seen, float("-inf"))
    last = scores.topk(min(keep, scores.shape[-1]), dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, level = scores > last, scores == last
    left = keep - above.sum(dim=-1, keepdim=True)  # places for those that are as good as the last
    return (above | (level & (level.cumsum(dim=-1) <= left))) & seen


fx.wrap("best")  # symbolic tracing knows no lengths


class TopK(Head):
    """softmax over the k largest of q kᵀ / √d, times their values; all other weights are zero.

    Args:
        site: Where the head is put.
        keep: k, how many keys a query keeps, of those it may see.
    """

    card = Card(
        name="top_k",
        family=Family.SPARSE,
        summary="Softmax attention to the few keys that score best with a query.",
        equation="softmax(top_k(q kᵀ / √d)) v",
        paper=Paper(
            "Memory-efficient Transformers via Top-k Attention",
            "Gupta et al.",
            2021,
            "arXiv:2106.06899",
            where="§3",
        ),
        time="n m c",
        memory="h n m",
        params="0",
        flops="4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={
            Law.STOCHASTIC,
            Law.PERMUTATION_EQUIVARIANT,
            Law.LINEAR_IN_VALUES,
            Law.BOUNDED,
            Law.HEADS_APART,
        },
        notes="All scores are formed, so it is as dense as softmax, and slower. Of keys with equal scores those that "
        "come first are kept. What is not kept gets no gradient, nor do queries and keys where one key alone is kept. "
        "The authors compute queries in chunks, which changes memory and no number. While k covers all keys it is "
        "`softmax`, bit for bit.",
    )

    def __init__(self, site: Site, *, keep: PositiveInt = 64):
        super().__init__(site)
        self.keep = keep

    def attend(self, q, k, v, *, mask, layout):
        if not isinstance(k, fx.Proxy) and self.keep >= k.shape[2]:
            return dot_product_attention(self, q, k, v, mask)
        scores = self.scores((q * q.shape[-1] ** -0.5) @ k.mT)
        kept = best(scores.detach(), mask.dense(q.shape[2], k.shape[2], q.device), self.keep)
        return self.weights(masked_softmax(scores, kept)) @ v
